"""The logbook: exact rows at every multiple, whatever the blocks, also across a resume."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnml.core import Mean, NonFiniteError
from fnml.train import means
from fnml.train._logbook import Logbook, pack

NAMES = ["loss", "accuracy"]


def entries(count, seed=0):
    """Draw one line per step as `pack` lays it out: totals by sorted name, then weights."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 4, (count, 2))
    weights[:, 1] = rng.integers(1, 4, count)
    return np.concatenate([rng.normal(size=(count, 2)), weights], 1).astype(np.float32)


def reference(lines, every):
    """Return every row as float64 means, added in the order of the steps."""
    rows = []
    for end in [*range(every, len(lines) + 1, every), len(lines)]:
        begin = rows[-1][0] if rows else 0
        if begin == end:
            continue
        total, weight = [0.0, 0.0], [0.0, 0.0]
        for line in lines[begin:end].astype(float):
            total = [t + x for t, x in zip(total, line[:2], strict=True)]
            weight = [w + x for w, x in zip(weight, line[2:], strict=True)]
        named = zip(sorted(NAMES), total, weight, strict=True)
        rows.append((end, {name: t / w for name, t, w in named if w}))
    return rows


def feed(book, lines, sizes, count=4):
    """Record lines in blocks, as a fused step gives them: padded beyond their own steps."""
    at = 0
    for size in sizes:
        if size is None:
            book.record(jnp.asarray(lines[at]))
            at += 1
            continue
        block = np.full((count, 4), np.nan, np.float32)
        block[:size] = lines[at : at + size]
        book.record(jnp.asarray(block), size)
        at += size
    return at


blocks = st.lists(st.sampled_from([None, 1, 2, 3, 4]), min_size=1, max_size=12)


@settings(deadline=None)
@given(
    sizes=blocks,
    every=st.integers(1, 9),
    reads=st.integers(0, 2**12 - 1),
    newest=st.integers(0, 2**12 - 1),
)
def test_rows_are_exact_at_the_multiples_however_steps_come_and_are_read(
    sizes, every, reads, newest
):
    lines = entries(sum(size or 1 for size in sizes))
    book, rows, at = Logbook(NAMES, every), [], 0
    for i, size in enumerate(sizes):
        at += feed(book, lines[at:], [size])
        before = at - (size or 1)
        assert book.due == any(s % every == 0 for s in range(book._read + 1, before + 1))
        if reads >> i & 1:
            rows += book.rows(newest=bool(newest >> i & 1))
    rows += book.rows()
    assert [step for step, _ in rows] == list(range(every, len(lines) + 1, every))
    rows += book.rest()
    assert rows == reference(lines, every)
    assert list(book.rest()) == [] and book.pending() == []


@settings(deadline=None)
@given(cut=st.integers(0, 11), every=st.integers(1, 9), infinite=st.booleans())
def test_pending_steps_survive_json_and_give_the_same_rows(cut, every, infinite):
    lines = entries(11)
    if infinite:
        lines[:, 0] = np.inf
    before = Logbook(NAMES, every)
    feed(before, lines, [None] * cut)
    rows = list(before.rows())
    saved = json.loads(json.dumps(before.pending(), allow_nan=False))
    after = Logbook(NAMES, every, cut, saved)
    feed(after, lines[cut:], [None] * (11 - cut))
    rows += [*after.rows(), *after.rest()]
    np.testing.assert_equal(rows, reference(lines, every))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_names_its_step_and_keeps_the_rows_before(bad):
    lines = entries(10)
    lines[6, 1] = bad
    book = Logbook(NAMES, 3)
    feed(book, lines, [4, 4, 2])
    rows = []
    with pytest.raises(NonFiniteError, match=f"loss of step 7 is {bad}"):
        rows.extend(book.rows())
    assert [step for step, _ in rows] == [3, 6]
    with pytest.raises(NonFiniteError, match="loss of step 107"):
        book = Logbook(NAMES, 50, 100)
        feed(book, lines, [4, 4, 2])
        list(book.rows())


def test_rows_stand_at_multiples_also_after_a_start_between_them():
    lines = entries(9)
    book = Logbook(NAMES, 5, 13)
    feed(book, lines, [4, 4, 1])
    rows = list(book.rows())
    assert [step for step, _ in rows] == [15, 20]
    assert [values for _, values in rows] == [
        reference(lines[:2], 9)[0][1],
        reference(lines[2:7], 9)[0][1],
    ]


def test_another_metric_may_be_infinite():
    lines = entries(2)
    lines[0, 0] = np.inf
    book = Logbook(NAMES, 2)
    feed(book, lines, [2])
    [(_, values)] = book.rows()
    assert values["accuracy"] == math.inf and math.isfinite(values["loss"])


def test_nothing_is_read_from_the_device_before_a_row():
    class Counted:
        """An array that counts how often it is read."""

        shape, reads = (4,), 0

        def __array__(self, *args, **kwargs):
            self.reads += 1
            return np.ones(4, np.float32)

    book, lines = Logbook(NAMES, 5), [Counted() for _ in range(6)]
    for line in lines:
        assert not book.due
        book.record(line)  # type: ignore[arg-type]
    assert book.due and not any(line.reads for line in lines)
    assert len(list(book.rows(newest=False))) == 1
    assert [line.reads for line in lines] == [1] * 5 + [0]
    assert list(book.rows()) == [] and lines[-1].reads == 1


def test_pack_and_means_speak_of_the_same_numbers():
    metrics = {
        "loss": Mean(jnp.float32(6), jnp.float32(4)),
        "accuracy": Mean(jnp.float32(1), jnp.float32(2)),
        "empty": Mean(jnp.float32(0), jnp.float32(0)),
    }
    packed = jax.jit(pack)(metrics)
    assert packed.dtype == jnp.float32 and packed.tolist() == [1, 0, 6, 2, 0, 4]
    assert means(metrics) == {"loss": 1.5, "accuracy": 0.5}
    book = Logbook(list(metrics), 1)
    book.record(packed)
    assert list(book.rows()) == [(1, means(metrics))]
