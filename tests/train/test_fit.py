"""fit owns no numerics: it equals the loop written by hand, with any schedule."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fit_runs import BATCHES, STEP, Memory, W, X, Y, bits, by_hand, evaluate, expected_row, start

from fnml.core import ConfigError, DataError, Mean, NonFiniteError, ShapeError
from fnml.data import ArraySource, Batches
from fnml.train import Every, fit

STEPS = 13


def stream():
    arrays = {"x": X.reshape(-1, 3), "y": Y.reshape(-1), "w": W.reshape(-1)}
    return Batches(ArraySource(arrays), batch_size=4, shuffle=False)


@pytest.mark.parametrize("source", [lambda: BATCHES, lambda: iter(BATCHES), stream])
@pytest.mark.parametrize("fuse", [1, 3, 8])
def test_it_has_the_bits_of_the_loop_by_hand_and_does_what_is_due_when_it_is_due(fuse, source):
    memory, called = Memory(), []

    def callback(progress):
        memory.events.append(("callback", progress.step))
        called.append((bits(progress.state.params), len(progress.evals), progress.row))

    began, batches = start(), source()
    result = fit(
        STEP,
        began,
        batches,
        steps=STEPS,
        fuse=fuse,
        log_every=4,
        sinks=[memory],
        evaluate=evaluate,
        eval_every=Every(steps=6),
        callbacks=[(Every(steps=6), callback), (Every(steps=5), callback)],
        save=memory.save,
        save_every=Every(steps=6),
        save_metric="loss",
    )
    states, _ = by_hand()
    assert bits(result.state) == bits(states[STEPS])
    assert bits(began) == bits(start())
    assert result.stopped is None and result.seconds > 0

    train = [(row.step, row.values) for row in memory.rows if row.kind == "train"]
    assert train == [
        (4, expected_row(0, 4)),
        (8, expected_row(4, 8)),
        (12, expected_row(8, 12)),
        (13, expected_row(12, 13)),
    ]
    assert result.row.step == 13
    assert [row.step for row in result.evals] == [6, 12, 13]
    assert [row for row in memory.rows if row.kind == "eval"] == list(result.evals)
    for row in result.evals:
        exact = {
            name: float(m.total) / float(m.weight) for name, m in evaluate(states[row.step]).items()
        }
        assert row.values == exact

    ended = ["flush"]
    assert [e for e in memory.events if e[0] != "train"] == [
        ("callback", 5),
        ("eval", 6), ("callback", 6), "flush", ("save", 6),
        ("callback", 10),
        ("eval", 12), ("callback", 12), "flush", ("save", 12),
        ("eval", 13), "flush", ("save", 13), *ended,
    ]  # fmt: skip
    at = memory.events.index
    assert at(("train", 12)) < at(("eval", 12)) and at(("train", 13)) < at(("eval", 13))
    assert [n for _, n, _ in called] == [0, 1, 1, 2]
    assert [row and row.step for _, _, row in called] == [4, 4, 8, 12]
    assert [b for b, _, _ in called] == [bits(states[s].params) for s in (5, 6, 10, 12)]
    for step, (state, meta, metric) in memory.saved.items():
        assert bits(state) == bits(states[step])
        assert metric == next(row.values["loss"] for row in result.evals if row.step == step)
        assert ("data" in meta) == isinstance(batches, Batches)


def test_minutes_are_counted_from_the_last_time():
    called = []

    def slow():
        for batch in BATCHES:
            time.sleep(0.02)
            yield batch

    when = Every(minutes=0.1 / 60)
    callbacks = [(when, lambda progress: called.append(time.perf_counter()))]
    fit(STEP, start(), slow(), steps=20, callbacks=callbacks)
    # A callback begins a little after it was found due: half the time is left as a margin.
    assert len(called) >= 2 and np.diff(called).min() > 0.05


def test_what_the_clock_makes_due_is_done_after_any_step():
    memory = Memory()
    result = fit(
        STEP,
        start(),
        BATCHES,
        steps=4,
        evaluate=evaluate,
        eval_every=Every(minutes=1e-9),
        save=memory.save,
        save_every=Every(minutes=1e9),
        callbacks=[(Every(minutes=1e9), lambda progress: "never")],
    )
    assert [row.step for row in result.evals] == [1, 2, 3, 4]
    assert list(memory.saved) == [4] and result.stopped is None


def test_without_an_evaluation_at_that_step_a_checkpoint_has_no_metric():
    memory = Memory()
    fit(
        STEP, start(), BATCHES, steps=6, evaluate=evaluate, eval_every=Every(steps=2),
        save=memory.save, save_every=Every(steps=3), save_metric="loss",
    )  # fmt: skip
    assert {step: metric is None for step, (_, _, metric) in memory.saved.items()} == {
        3: True,
        6: False,
    }


def test_a_run_that_is_done_does_nothing():
    memory, state = Memory(), dataclasses.replace(start(), step=jnp.int32(5))
    result = fit(STEP, state, BATCHES, steps=5, sinks=[memory], save=memory.save)
    assert result.state is state and result.stopped is None and not memory.events


@pytest.mark.parametrize("fuse", [1, 3, 8])
def test_batches_that_end_stop_the_run_after_the_last_one(fuse):
    memory = Memory()
    result = fit(
        STEP, start(), iter(BATCHES[:10]), steps=50, fuse=fuse, log_every=4, sinks=[memory],
        save=memory.save, evaluate=evaluate,
    )  # fmt: skip
    assert result.stopped == "the batches ended after step 10"
    assert bits(result.state) == bits(by_hand()[0][10])
    assert list(memory.saved) == [10] and [row.step for row in result.evals] == [10]
    assert memory.values[2] == ("train", 10, expected_row(8, 10))


def test_the_last_checkpoint_knows_the_last_row_and_evaluation():
    memory = Memory()
    fit(
        STEP, start(), iter(BATCHES[:10]), steps=50, log_every=4, evaluate=evaluate,
        save=memory.save, save_every=Every(steps=5), save_metric="loss",
    )  # fmt: skip
    _, meta, metric = memory.saved[10]
    assert [e for e in memory.events if e[0] == "save"] == [("save", 5), ("save", 10), ("save", 10)]
    assert json.loads(meta)["log"] == [] and metric is not None
    assert [entry["step"] for entry in json.loads(meta)["evals"]] == [10]


def test_no_batches_at_all_are_an_error():
    with pytest.raises(DataError, match="no batches to go on with after step 0"):
        fit(STEP, start(), [], steps=3)


@pytest.mark.parametrize("fuse", [1, 3])
def test_a_callback_stops_the_run_and_its_last_word_is_kept(fuse):
    memory = Memory()
    result = fit(
        STEP, start(), BATCHES, steps=10, fuse=fuse, sinks=[memory], save=memory.save,
        callbacks=[
            (Every(steps=2), lambda p: "enough" if p.step == 4 else None),
            (Every(steps=1), lambda p: None),
        ],
    )  # fmt: skip
    assert result.stopped == "enough" and int(result.state.step) == 4
    assert list(memory.saved) == [4] and memory.values[-1] == ("train", 4, expected_row(0, 4))


def test_a_callback_that_stops_at_the_last_step_stops_nothing():
    callbacks = [(Every(steps=4), lambda progress: "enough")]
    assert fit(STEP, start(), BATCHES, steps=4, callbacks=callbacks).stopped is None


@pytest.mark.parametrize("fuse", [1, 4])
def test_a_loss_that_is_not_finite_names_its_step_and_nothing_is_saved_after_it(fuse):
    memory = Memory()
    bad = [dict(batch) for batch in BATCHES]
    bad[6] = {**bad[6], "y": np.full(4, np.nan, np.float32)}
    with pytest.raises(NonFiniteError, match="loss of step 7 is nan"):
        fit(
            STEP, start(), bad, steps=20, fuse=fuse, log_every=3, sinks=[memory],
            save=memory.save, save_every=Every(steps=7),
            callbacks=[(Every(steps=5), lambda p: memory.save(p.state, {}, None))],
        )  # fmt: skip
    assert list(memory.saved) == [5]
    assert [row.step for row in memory.rows] == [3, 6]


def test_a_parameter_that_is_not_finite_is_named_and_not_saved():
    def step(state, batch):
        bad = jnp.where(state.step == 4, jnp.inf, 0.0)
        params = {"w": state.params["w"] + bad, "n": state.params["n"], "v": state.params["v"]}
        new = dataclasses.replace(state, step=state.step + 1, params=params)
        return new, {"loss": Mean(jnp.float32(1), jnp.float32(1))}

    memory = Memory()
    params = {"w": jnp.zeros(2), "n": jnp.int32(1), "v": jnp.zeros(2)}
    state = dataclasses.replace(start(), params=params)
    with pytest.raises(NonFiniteError, match=r"after step 5 1 of 2 parameters .*: w\. Nothing"):
        fit(step, state, BATCHES, steps=9, save=memory.save, save_every=Every(steps=1))
    assert list(memory.saved) == [1, 2, 3, 4]


@pytest.mark.parametrize("fuse", [1, 3])
def test_a_second_compilation_is_noted_once_and_the_first_is_not(fuse):
    notes = []
    fit(STEP, start(), BATCHES, steps=8, fuse=fuse, log_every=2, note=notes.append,
        callbacks=[(Every(steps=4), lambda p: None)])  # fmt: skip
    assert notes == []
    if fuse == 1:
        ragged = [*BATCHES[:4], jax.tree.map(lambda x: x[:2], BATCHES[4]), *BATCHES[5:]]
        fit(STEP, start(), ragged, steps=12, log_every=2, note=notes.append)
        assert len(notes) == 1 and "compiled again by step 5" in notes[0]


def test_batches_of_unequal_shapes_cannot_be_fused():
    ragged = [*BATCHES[:4], jax.tree.map(lambda x: x[:2], BATCHES[4]), *BATCHES[5:]]
    with pytest.raises(ShapeError, match="unequal shapes cannot be fused"):
        fit(STEP, start(), ragged, steps=9, fuse=3)


def test_what_cannot_run_is_refused_before_anything_happens():
    memory = Memory()
    wrong = [{"x": np.zeros((4, 2), np.float32), "y": Y[0], "w": W[0]}]
    for fuse in (1, 2):
        with pytest.raises(ShapeError, match=r"x: float32\[4, 2\]"):
            fit(STEP, start(), wrong * 2, steps=4, fuse=fuse, sinks=[memory], save=memory.save)
    assert not memory.events


def test_every_wrong_argument_is_listed():
    with pytest.raises(ConfigError) as error:
        fit(
            STEP, start(), BATCHES, steps=-1, fuse=0, log_every=0,
            eval_every=Every(steps=1), save_every=Every(steps=1),
        )  # fmt: skip
    for part in (
        "steps is -1, expected at least 0",
        "fuse is 0",
        "log_every is 0",
        "eval_every is given without evaluate",
        "save_every is given without save",
    ):
        assert part in str(error.value)


def test_rows_read_together_share_one_measurement_of_speed():
    memory = Memory()
    fit(STEP, start(), BATCHES, steps=20, fuse=8, log_every=2, sinks=[memory])
    timings = [row.timing for row in memory.rows]
    assert [row.step for row in memory.rows] == list(range(2, 21, 2))
    assert timings[0] == timings[3] and timings[4] == timings[9] != timings[0]
    last = timings[-1]
    assert last["samples_per_second"] == pytest.approx(4 * last["steps_per_second"])
    assert 0 <= last["data_wait"] <= 1 and last["compile_seconds"] > 0 and last["seconds"] > 0


def test_the_source_is_closed_whatever_happens():
    class Source:
        closed = 0

        def feed(self, sizes, place=None):
            return self

        def __iter__(self):
            return iter(BATCHES)

        def close(self):
            self.closed += 1

    source = Source()
    fit(STEP, start(), source, steps=2)
    assert source.closed == 1

    def fail(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(STEP, start(), source, steps=2, callbacks=[(Every(steps=1), fail)])
    assert source.closed == 2
