"""A run that was killed or stopped goes on to the same bits and the same rows."""

import json
import os
import signal

import pytest
from fit_runs import BATCHES, STEP, Memory, W, X, Y, bits, by_hand, evaluate, start

from fnml.data import ArraySource, Batches
from fnml.train import Every, early_stopping, fit, stop_on_signals

STEPS = 17


class Killed(Exception):
    """What stands for SIGKILL: nothing runs after it."""


def stream():
    arrays = {"x": X.reshape(-1, 3), "y": Y.reshape(-1), "w": W.reshape(-1)}
    return Batches(ArraySource(arrays), batch_size=4, seed=3)


def run(memory, state, batches, fuse, kill=None, **options):
    def callback(progress):
        if progress.step == kill:
            raise Killed

    return fit(
        STEP,
        state,
        batches,
        steps=STEPS,
        fuse=fuse,
        log_every=5,
        sinks=[memory],
        evaluate=evaluate,
        eval_every=Every(steps=4),
        callbacks=[(Every(steps=3), callback)],
        save=memory.save,
        save_every=Every(steps=2),
        **options,
    )


@pytest.mark.parametrize("fuse", [1, 4])
@pytest.mark.parametrize("plain", [True, False])
def test_from_every_saved_step_a_run_reaches_the_same_bits_and_rows(fuse, plain):
    whole = Memory()
    final = run(whole, start(), BATCHES if plain else stream(), fuse)
    assert not plain or bits(final.state) == bits(by_hand()[0][STEPS])
    assert list(whole.saved) == [2, 4, 6, 8, 10, 12, 14, 16, 17]

    killed = Memory()
    with pytest.raises(Killed):
        run(killed, start(), BATCHES if plain else stream(), fuse, kill=12)
    assert list(killed.saved) == [2, 4, 6, 8, 10]

    for step, (state, meta, _) in killed.saved.items():
        meta = json.loads(meta)
        memory = killed.until(step)
        batches = BATCHES[step:] if plain else stream().resume(meta["data"])
        result = run(memory, state, batches, fuse, resume=meta)
        assert bits(result.state) == bits(final.state)
        assert memory.values == whole.values
        assert [row.values for row in result.evals] == [row.values for row in final.evals]
        assert result.seconds > meta["seconds"] > 0
        for later, (_, again, _) in memory.saved.items():
            # Positions in the data count from the start of the run, not of its last part.
            assert plain or json.loads(again)["data"] == json.loads(whole.saved[later][1])["data"]


def test_checkpoints_by_the_clock_hold_the_steps_of_an_unfinished_row():
    def train(memory, state, batches, **options):
        return fit(
            STEP, state, batches, steps=STEPS, log_every=5, sinks=[memory],
            save=memory.save, save_every=Every(minutes=1e-9), **options,
        )  # fmt: skip

    whole = Memory()
    train(whole, start(), BATCHES)
    assert list(whole.saved) == list(range(1, STEPS + 1))
    for step in (3, 7, 10):
        state, meta, _ = whole.saved[step]
        memory = whole.until(step)
        train(memory, state, BATCHES[step:], resume=json.loads(meta))
        assert memory.values == whole.values


def test_without_its_memory_a_resumed_run_would_write_other_rows():
    whole, memory = Memory(), Memory()
    run(whole, start(), BATCHES, 1)
    state, _, _ = whole.saved[8]
    run(memory, state, BATCHES[8:], 1)
    assert memory.values != [row for row in whole.values if row[1] > 8]


@pytest.mark.parametrize("fuse", [1, 4])
@pytest.mark.parametrize("stop", [3, 8, 16])
def test_a_signalled_run_saves_and_goes_on_to_the_same_rows(fuse, stop):
    whole, memory = Memory(), Memory()
    final = run(whole, start(), BATCHES, fuse)
    steps = []

    def should_stop():
        steps.append(1)
        return "SIGTERM" if done() >= stop else None

    def done():
        return max([step for _, step, _ in memory.values] + seen)

    seen = [0]
    result = fit(
        STEP, start(), BATCHES, steps=STEPS, fuse=fuse, log_every=5, sinks=[memory],
        evaluate=evaluate, eval_every=Every(steps=4),
        callbacks=[(Every(steps=1), lambda p: seen.append(p.step))],
        save=memory.save, should_stop=should_stop,
    )  # fmt: skip
    assert result.stopped == "SIGTERM" and int(result.state.step) == stop
    assert list(memory.saved) == [stop]
    state, meta, _ = memory.saved[stop]
    memory = memory.until(stop)
    result = run(memory, state, BATCHES[stop:], fuse, resume=json.loads(meta))
    assert bits(result.state) == bits(final.state)
    assert memory.values == whole.values


@pytest.mark.parametrize("fuse", [1, 4])
def test_a_signal_in_the_last_block_does_not_cost_the_last_row_and_evaluation(fuse):
    whole, memory, seen = Memory(), Memory(), []
    run(whole, start(), BATCHES, fuse)

    def callback(progress):
        seen.append(progress.step)

    result = fit(
        STEP, start(), BATCHES, steps=STEPS, fuse=fuse, log_every=5, sinks=[memory],
        evaluate=evaluate, eval_every=Every(steps=4), save=memory.save,
        callbacks=[(Every(steps=STEPS), callback)],
        should_stop=lambda: "SIGTERM" if seen else None,
    )  # fmt: skip
    assert result.stopped is None
    assert memory.values == whole.values


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_real_signal_stops_at_the_next_step(number):
    memory = Memory()

    def callback(progress):
        if progress.step == 3:
            os.kill(os.getpid(), number)

    with stop_on_signals() as stopped:
        result = fit(
            STEP, start(), BATCHES, steps=10, save=memory.save, should_stop=stopped,
            callbacks=[(Every(steps=1), callback)],
        )  # fmt: skip
    assert result.stopped == signal.Signals(number).name
    assert list(memory.saved) == [int(result.state.step)] and int(result.state.step) in (3, 4)


def test_early_stopping_stops_a_resumed_run_at_the_same_step():
    stop = early_stopping("loss", patience=2, min_delta=1e9)

    def train(memory, state, batches, kill=None, **options):
        def killer(progress):
            if progress.step == kill:
                raise Killed

        return fit(
            STEP, state, batches, steps=STEPS, sinks=[memory], evaluate=evaluate,
            eval_every=Every(steps=4), callbacks=[(Every(steps=4), stop), (Every(steps=1), killer)],
            save=memory.save, save_every=Every(steps=5), **options,
        )  # fmt: skip

    whole, killed = Memory(), Memory()
    final = train(whole, start(), BATCHES)
    assert int(final.state.step) == 12 and "not better" in final.stopped
    with pytest.raises(Killed):
        train(killed, start(), BATCHES, kill=11)
    state, meta, _ = killed.saved[10]
    result = train(killed.until(10), state, BATCHES[10:], resume=json.loads(meta))
    assert result.stopped == final.stopped and bits(result.state) == bits(final.state)
