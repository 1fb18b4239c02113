"""fit(fuse="auto"): measured on copies, chosen only where the bits are equal, changing no result."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fit_runs import BATCHES, STEP, Memory, W, X, Y, bits, by_hand, evaluate, expected_row, start

from fnml.core import Mean
from fnml.data import ArraySource, Batches
from fnml.train import Every, fit
from fnml.train import _choose_fuse as module

STEPS = 13


@pytest.fixture
def slow_single_steps(monkeypatch):
    """A clock by which single steps take ten times as long as fused ones."""
    spent = iter(np.arange(1, 1000))

    def timed(function):
        out, at = function(), next(spent)
        # Two single steps are timed first, then a fused block; then both take turns.
        return out, 10.0 if at > 3 and at % 2 == 0 else 1.0

    monkeypatch.setattr(module, "_timed", timed)
    monkeypatch.setattr(module, "_SHARE", np.inf)


def stream():
    arrays = {"x": X.reshape(-1, 3), "y": Y.reshape(-1), "w": W.reshape(-1)}
    return Batches(ArraySource(arrays), batch_size=4, shuffle=False)


@pytest.mark.parametrize("source", [lambda: BATCHES, lambda: iter(BATCHES), stream])
def test_it_goes_over_to_blocks_with_the_bits_rows_and_saves_of_single_steps(
    source, slow_single_steps
):
    memory, notes = Memory(), []
    result = fit(
        STEP, start(), source(), steps=STEPS, fuse="auto", log_every=4, sinks=[memory],
        evaluate=evaluate, eval_every=Every(steps=6), save=memory.save, save_every=Every(steps=5),
        note=notes.append,
    )  # fmt: skip
    assert result.fuse == 4 and notes == ["fuse: 4, which is 10.00 times as fast as single steps"]
    assert bits(result.state) == bits(by_hand()[0][STEPS])
    assert [(row.step, row.values) for row in memory.rows if row.kind == "train"] == [
        (4, expected_row(0, 4)),
        (8, expected_row(4, 8)),
        (12, expected_row(8, 12)),
        (13, expected_row(12, 13)),
    ]
    assert [row.step for row in result.evals] == [6, 12, 13]
    assert list(memory.saved) == [5, 10, 13]
    for step, (state, meta, _) in memory.saved.items():
        assert bits(state) == bits(by_hand()[0][step])
        data = json.loads(meta).get("data")
        assert data is None or data["position"] == 4 * step


def test_a_step_with_other_bits_in_a_loop_stays_single(slow_single_steps, monkeypatch):
    def tampered(step, count):
        def fused(state, batches, steps):
            live, rows = original(step, count)(state, batches, steps)
            return jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, live), rows

        return fused

    from fnml.train import _fit

    original = _fit.fuse_steps
    monkeypatch.setattr(_fit, "fuse_steps", tampered)
    notes = []
    result = fit(STEP, start(), BATCHES, steps=STEPS, fuse="auto", log_every=4, note=notes.append)
    assert result.fuse == 1 and "other bits in a fused loop" in notes[0]
    assert bits(result.state) == bits(by_hand()[0][STEPS])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"log_every": 1}, "no two steps fit between what is due"),
        ({"callbacks": [(Every(steps=1), lambda progress: None)]}, "no two steps fit"),
        ({"log_every": 4}, "12 steps left are too few to measure for"),
    ],
)
def test_where_a_measurement_cannot_pay_there_is_none(options, reason):
    notes = []
    result = fit(STEP, start(), BATCHES, steps=STEPS, fuse="auto", note=notes.append, **options)
    assert result.fuse == 1 and reason in notes[0]


def test_a_source_that_cannot_be_taken_up_again_is_left_alone(slow_single_steps):
    class Source:
        def feed(self, sizes, place=None):
            return iter(BATCHES)

    result = fit(STEP, start(), Source(), steps=STEPS, fuse="auto", log_every=4)
    assert result.fuse == 1 and bits(result.state) == bits(by_hand()[0][STEPS])


def test_slower_blocks_are_not_chosen(slow_single_steps, monkeypatch):
    monkeypatch.setattr(module, "_WORTH_IT", 11.0)
    notes = []
    result = fit(STEP, start(), BATCHES, steps=STEPS, fuse="auto", log_every=4, note=notes.append)
    assert result.fuse == 1 and notes == ["fuse: 1, as 4 in one dispatch are 10.00 times as fast"]


def test_the_state_is_donated_and_metrics_are_read_only_for_rows(monkeypatch):
    """Nothing is transferred that nobody reads, and nothing is copied that is overwritten."""
    from fnml.train import _fit, _logbook

    compiled, reads = [], []
    make, read = _fit._compiled, np.asarray

    def kept(*args):
        run = make(*args)
        compiled.append(run)
        return run

    monkeypatch.setattr(_fit, "_compiled", kept)
    counting = types.SimpleNamespace(
        **{**vars(np), "asarray": lambda x: reads.append(x.shape) or read(x)}
    )
    monkeypatch.setattr(_logbook, "np", counting)
    state = start()
    fit(STEP, state, BATCHES, steps=20, log_every=10)
    # One array for each step, however many metrics it has, and only when a row is due.
    assert reads == [(4,)] * 20
    keys = _fit.Raw.of(state)
    memory = compiled[0].lower(keys.strip(state), BATCHES[0]).compile().memory_analysis()
    live = sum(x.nbytes for x in jax.tree.leaves(keys.strip(state)))
    assert memory.alias_size_in_bytes == live


def test_a_step_is_traced_once_for_all_that_is_made_of_it():
    traced = []

    def step(state, batch):
        traced.append(1)
        new = dataclasses.replace(state, step=state.step + 1)
        return new, {"loss": Mean(jnp.float32(1), jnp.float32(1))}

    fit(functools.partial(step), start(), BATCHES, steps=6, fuse=3, log_every=3)
    assert len(traced) == 1
