import math

from hypothesis import given
from hypothesis import strategies as st

from fnml.checkpoint._retention import best_steps, kept_steps

metrics = st.dictionaries(
    st.integers(0, 50),
    st.none() | st.sampled_from([0.0, 1.0, math.nan, math.inf, -math.inf]) | st.floats(),
    min_size=1,
)
counts = st.integers(0, 5)
directions = st.sampled_from(["min", "max"])


@given(metrics, counts, directions)
def test_the_best_are_finite_and_no_other_is_better(values, count, best):
    chosen = best_steps(values, count, best)
    finite = {s: m for s, m in values.items() if m is not None and math.isfinite(m)}
    assert len(chosen) == min(count, len(finite))
    assert set(chosen) <= finite.keys()
    better = (lambda a, b: a < b) if best == "min" else (lambda a, b: a > b)
    for inside in chosen:
        for outside in finite.keys() - set(chosen):
            assert not better(finite[outside], finite[inside])
            if finite[outside] == finite[inside]:
                assert inside < outside


@given(metrics, st.integers(1, 5), counts, directions, st.data())
def test_the_saved_the_last_and_the_best_are_kept_and_nothing_else(values, last, best, way, data):
    saved = data.draw(st.sampled_from(sorted(values)))
    kept = kept_steps(values, saved=saved, keep_last=last, keep_best=best, best=way)
    newest = sorted(values, reverse=True)[:last]
    assert kept == {saved} | set(newest) | set(best_steps(values, best, way))
