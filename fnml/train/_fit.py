"""The training loop: a plain loop over a pure step, and what happens between steps."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fnml.core import ConfigError, DataError, Mean, NonFiniteError, Row, Sink, State, path_name
from fnml.train._check import check_step
from fnml.train._choose_fuse import choose_fuse
from fnml.train._clock import Clock
from fnml.train._every import Every
from fnml.train._feed import at, open_feed, reopens
from fnml.train._logbook import Logbook, means, pack, to_json
from fnml.train._raw import Raw, is_key
from fnml.train._step import Step
from fnml.transforms import fuse as fuse_steps

PyTree = Any
Save = Callable[[State, dict[str, Any], float | None], None]


@dataclass(frozen=True)
class Progress:
    """What a callback is given.

    Attributes:
      step: the number of steps done.
      state: the state after that step. It is reused by the next step: read it, or copy it.
      row: the last row of training metrics, ``None`` before the first.
      evals: every evaluation so far, also those before a resume.
    """

    step: int
    state: State
    row: Row | None
    evals: tuple[Row, ...]


Callback = Callable[[Progress], str | None]


class Fit(NamedTuple):
    """What a run came to.

    Attributes:
      state: the final state.
      stopped: ``None`` if all steps were done, else why the run stopped before.
      row: the last row of training metrics.
      evals: every evaluation.
      seconds: wall time, earlier parts of a resumed run included.
      fuse: how many steps went into one dispatch, also where that was measured.
    """

    state: State
    stopped: str | None
    row: Row | None
    evals: tuple[Row, ...]
    seconds: float
    fuse: int = 1


def fit(
    step: Step,
    state: State,
    batches: Iterable[PyTree],
    *,
    steps: int,
    fuse: int | Literal["auto"] = 1,
    log_every: int = 50,
    sinks: Sequence[Sink] = (),
    evaluate: Callable[[State], Mapping[str, Mean]] | None = None,
    eval_every: Every | None = None,
    callbacks: Sequence[tuple[Every, Callback]] = (),
    save: Save | None = None,
    save_every: Every | None = None,
    save_metric: str | None = None,
    should_stop: Callable[[], str | None] = lambda: None,
    agree: Callable[[int, Mapping[str, str] | None], Mapping[str, str]] | None = None,
    resume: Mapping[str, Any] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Fit:
    """Train until ``steps`` steps are done.

    Law: the final state has the bits that ``state, _ = jax.jit(step)(state, batch)`` in a loop
    over the same batches gives, with any ``fuse`` and any schedule. ``state`` itself stays valid.

    At a step where several things are due, the order is: rows, evaluation, callbacks, checkpoint.

    Args:
      step: ``step(state, batch) -> (state, metrics)``, as :func:`fnml.train.train_step` makes.
      state: where to start; training goes on from ``state.step``.
      batches: batches of arrays ``[B, ...]``; a :class:`fnml.data.Batches` is prefetched in a
        thread, and its position is saved with checkpoints.
      steps: the total number of steps, those before ``state.step`` included.
      fuse: how many steps to run in one dispatch; blocks are cut where something is due.
        ``"auto"`` measures after the first step, on copies of the state and with the first batch,
        whether that is faster, and stays with one where the bits would differ, and where the run is
        too short for a measurement to pay.
      log_every: a row of training metrics for every so many steps.
      sinks: where rows go.
      evaluate: ``evaluate(state) -> metrics``; done when ``eval_every`` says and at the end.
      eval_every: when to evaluate.
      callbacks: ``(when, callback)`` pairs; a callback that returns a string stops the run.
      save: ``save(state, meta, metric)``; ``meta`` is JSON, to be given back as ``resume``;
        ``metric`` is ``save_metric`` of an evaluation at this very step, else ``None``.
      save_every: when to save; at the end and at a stop it is always done.
      save_metric: which evaluation metric ranks checkpoints.
      should_stop: asked after every block; a string stops the run, after a checkpoint.
      agree: where several processes train together, turns what this one's signals and clock ask for
        into what all do after the same step; see :meth:`fnml.parallel.Processes.agree`.
      resume: the ``meta`` saved with ``state``.
      note: takes messages for the user, such as an unexpected recompilation.

    Raises:
      ConfigError: an argument is out of range.
      DataError: there is not a single batch.
      ShapeError: the step does not take this batch, or changes the state's shapes; found before
        anything is compiled.
      NonFiniteError: a loss or parameter became NaN or infinite. Nothing is saved after it.
    """
    start = int(state.step)
    auto, count = fuse == "auto" and reopens(batches), 1 if fuse == "auto" else fuse
    _check_arguments(steps, start, count, log_every, evaluate, eval_every, save, save_every)
    memory = dict(resume or {})
    evals = [_from_json(entry, "eval") for entry in memory.get("evals", ())]
    row = _from_json(memory["row"], "train") if memory.get("row") else None
    before = float(memory.get("seconds", 0.0))
    clock = Clock()
    if start >= steps or memory.get("stopped"):
        # Only the last words were missing: a callback's stop is not to be taken back.
        return Fit(state, memory.get("stopped"), row, tuple(evals), before, count)

    schedules = [when for when in (eval_every, save_every, *(w for w, _ in callbacks)) if when]
    source = batches if hasattr(batches, "feed") else iter(batches)
    feed = open_feed(source, count, functools.partial(_blocks, start, steps, count, schedules))
    done, stopped, signalled, ended = start, None, None, None
    try:
        try:
            size, batch = next(feed)
        except StopIteration:
            raise DataError(f"there are no batches to go on with after step {start}") from None
        # Traced once, for all that is made of it.
        step = jax.jit(step, inline=True)
        metrics = check_step(step, state, _first(batch) if count > 1 else batch)
        book = Logbook(list(metrics), log_every, start, memory.get("log", ()))
        samples = max((x.shape[1 if count > 1 else 0] for x in jax.tree.leaves(batch)), default=0)
        keys = Raw.of(state)
        live = jax.jit(lambda state: keys.strip(jax.tree.map(_copy, state)))(state)
        del state
        run = _compiled(step, count, keys)
        last = dict.fromkeys(range(len(callbacks) + 2), clock.now())
        compilations = 0
        evaluated = saved = -1
        slots = [(0, eval_every), (1, save_every), *enumerate((w for w, _ in callbacks), 2)]
        clocked = [(slot, w) for slot, w in slots if w is not None and w.minutes is not None]

        def decide() -> Mapping[str, str]:
            """Ask the clock what is due by now, and the other processes, if there are any."""
            late = [slot for slot, when in clocked if when.overdue(clock.now() - last[slot])]
            wishes = {f"due {slot}": "" for slot in late}
            if agree is None:
                return wishes
            if done >= steps:
                return agree(done, None)
            reason = should_stop()
            return agree(done, {**wishes, "stop": reason} if reason else wishes)

        def log(rows: Iterable[tuple[int, dict[str, float]]]) -> None:
            nonlocal row
            timing: dict[str, float] = {}
            for at, values in rows:
                # Rows read together were computed together: they share one measurement.
                timing = timing or clock.timing(done, samples, feed.waited, before)
                row = Row(at, "train", values, timing)
                for sink in sinks:
                    sink.write(row)

        def evaluation() -> None:
            nonlocal evaluated
            assert evaluate is not None
            with clock.paused():
                found = Row(
                    done,
                    "eval",
                    means(evaluate(keys.dress(live))),
                    {"seconds": clock.now() + before},
                )
            evals.append(found)
            evaluated = done
            for sink in sinks:
                sink.write(found)

        def checkpoint() -> None:
            nonlocal saved
            assert save is not None
            with clock.paused():
                state = keys.dress(live)
                _check_finite(state, done)
                for sink in sinks:
                    sink.flush()
                meta = {
                    "log": book.pending(),
                    "evals": [_to_json(found) for found in evals],
                    "row": row and _to_json(Row(row.step, row.kind, row.values)),
                    "stopped": stopped,
                    "seconds": clock.now() + before,
                }
                if hasattr(batches, "state"):
                    meta["data"] = batches.state(done - start)
                metric = evals[-1].values.get(save_metric or "") if evaluated == done else None
                save(state, meta, metric)
            saved = done

        def due(slot: int, when: Every | None) -> bool:
            if when is None or not (when.due(done, 0.0) or f"due {slot}" in decided):
                return False
            last[slot] = clock.now()
            return True

        clock.start(start)
        while True:
            live, packed = run(live, batch) if size is None else run(live, batch, size)
            done += size or 1
            book.record(packed, size)
            if compilations == 0:
                compilations = clock.compiled()
                if auto and done < steps:
                    with clock.paused():
                        choice = choose_fuse(
                            run,
                            lambda count: _compiled(step, count, keys),
                            live,
                            batch,
                            most=min(log_every, steps - done, *_gaps(schedules)),
                            steps=steps - done,
                            compile_seconds=clock.compile_seconds,
                        )
                    note(choice.reason)
                    if choice.steps > 1:
                        count, run = choice.steps, choice.run
                        feed.close()
                        feed = open_feed(
                            at(source, done - start),
                            count,
                            functools.partial(_blocks, done, steps, count, schedules),
                        )
            decided = decide()
            scheduled = done == steps or any(w.due(done, 0.0) for w in schedules)
            if scheduled or book.due:
                log(book.rows(newest=scheduled))
                if run._cache_size() > compilations:
                    compilations = run._cache_size()
                    note(
                        f"the step was compiled again by step {done}: a batch had other shapes or "
                        "dtypes than the first one"
                    )
            if evaluate is not None and due(0, eval_every):
                log(book.rows())
                evaluation()
            for i, (when, callback) in enumerate(callbacks):
                if due(i + 2, when):
                    log(book.rows())
                    stopped = (
                        callback(Progress(done, keys.dress(live), row, tuple(evals))) or stopped
                    )
            if done >= steps:
                stopped = None
                break
            if not stopped:
                signalled = should_stop() if agree is None else decided.get("stop")
            if stopped or signalled:
                break
            if save is not None and due(1, save_every):
                log(book.rows())
                checkpoint()
            try:
                size, batch = next(feed)
            except StopIteration:
                ended = f"the batches ended after step {done}"
                break
        if agree is not None:
            agree(done, None)
        log(book.rows())
        if not signalled:
            # A signalled run goes on later: its unfinished row and evaluation are done then.
            if book.pending() or (evaluate is not None and evaluated != done):
                saved = -1
            log(book.rest())
            if evaluate is not None and evaluated != done:
                evaluation()
        if save is not None and saved != done:
            checkpoint()
        for sink in sinks:
            sink.flush()
        state = keys.dress(live)
        return Fit(
            state, stopped or signalled or ended, row, tuple(evals), clock.now() + before, count
        )
    finally:
        feed.close()


def _to_json(row: Row) -> dict[str, Any]:
    values = {name: to_json(value) for name, value in row.values.items()}
    return {"step": row.step, "values": values, "timing": dict(row.timing)}


def _from_json(entry: Mapping[str, Any], kind: Literal["train", "eval"]) -> Row:
    values = {name: float(v) for name, v in entry["values"].items()}
    return Row(entry["step"], kind, values, entry["timing"])


def _check_arguments(
    steps: int,
    start: int,
    fuse: int,
    log_every: int,
    evaluate: Any,
    eval_every: Any,
    save: Any,
    save_every: Any,
) -> None:
    faults = [
        f"{name} is {value}, expected at least {least}"
        for name, value, least in (
            ("steps", steps, 0),
            ("fuse", fuse, 1),
            ("log_every", log_every, 1),
        )
        if value < least
    ]
    if eval_every is not None and evaluate is None:
        faults.append("eval_every is given without evaluate")
    if save_every is not None and save is None:
        faults.append("save_every is given without save")
    if faults:
        raise ConfigError("fit: " + "; ".join(faults))


def _blocks(start: int, steps: int, fuse: int, schedules: Sequence[Every]) -> Iterator[int | None]:
    """Yield block sizes from ``start`` to ``steps``, cut where something is due by steps."""
    done = start
    while done < steps:
        if fuse == 1:
            done += 1
            yield None
            continue
        ahead = [at for when in schedules if (at := when.next_step(done)) is not None]
        size = min(fuse, steps - done, *(at - done for at in ahead))
        done += size
        yield size


def _gaps(schedules: Sequence[Every]) -> list[int]:
    """Return how many steps lie between what the schedules make due by steps."""
    return [when.steps for when in schedules if when.steps is not None]


def _compiled(step: Step, fuse: int, keys: Raw) -> Any:
    """Compile the step on states as :class:`Raw` has them; what is given to it is donated."""

    def packed(live: PyTree, batch: PyTree) -> tuple[PyTree, jax.Array]:
        state, metrics = step(keys.dress(live), batch)
        return keys.strip(state), pack(metrics)

    return jax.jit(packed if fuse == 1 else fuse_steps(packed, fuse), donate_argnums=0)


def _copy(x: Any) -> jax.Array:
    """Copy an array, so that donating the copy leaves the caller's alone, and drop weak types."""
    return x.copy() if is_key(x) else jnp.array(x, x.dtype)


def _first(batch: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)


@jax.jit
def _finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.all(jnp.isfinite(x)) for x in leaves]


def _check_finite(state: State, step: int) -> None:
    leaves = [
        (path_name(path), x)
        for path, x in jax.tree.leaves_with_path(state.params)
        if jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    flags = jax.device_get(_finite([x for _, x in leaves]))
    bad = [name for (name, _), fine in zip(leaves, flags, strict=True) if not fine]
    if bad:
        raise NonFiniteError(
            f"after step {step} {len(bad)} of {len(leaves)} parameters are not finite: "
            f"{', '.join(bad)}. Nothing was saved; the last good checkpoint is kept. Lower the "
            "learning rate or clip the gradients"
        )
