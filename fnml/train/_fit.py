"""The training loop: a plain loop over a pure step, and what happens between steps."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fnml.core import ConfigError, DataError, Mean, NonFiniteError, Row, Sink, State, path_name
from fnml.train._check import check_step
from fnml.train._every import Every
from fnml.train._feed import open_feed
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
    """

    state: State
    stopped: str | None
    row: Row | None
    evals: tuple[Row, ...]
    seconds: float


def fit(
    step: Step,
    state: State,
    batches: Iterable[PyTree],
    *,
    steps: int,
    fuse: int = 1,
    log_every: int = 50,
    sinks: Sequence[Sink] = (),
    evaluate: Callable[[State], Mapping[str, Mean]] | None = None,
    eval_every: Every | None = None,
    callbacks: Sequence[tuple[Every, Callback]] = (),
    save: Save | None = None,
    save_every: Every | None = None,
    save_metric: str | None = None,
    should_stop: Callable[[], str | None] = lambda: None,
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
    _check_arguments(steps, start, fuse, log_every, evaluate, eval_every, save, save_every)
    memory = dict(resume or {})
    evals = [_from_json(entry, "eval") for entry in memory.get("evals", ())]
    row = _from_json(memory["row"], "train") if memory.get("row") else None
    before = float(memory.get("seconds", 0.0))
    clock = _Clock()
    if start >= steps or memory.get("stopped"):
        # Only the last words were missing: a callback's stop is not to be taken back.
        return Fit(state, memory.get("stopped"), row, tuple(evals), before)

    schedules = [when for when in (eval_every, save_every, *(w for w, _ in callbacks)) if when]
    feed = open_feed(batches, fuse, lambda: _blocks(start, steps, fuse, schedules))
    done, stopped, signalled, ended = start, None, None, None
    try:
        try:
            size, batch = next(feed)
        except StopIteration:
            raise DataError(f"there are no batches to go on with after step {start}") from None
        metrics = check_step(step, state, _first(batch) if fuse > 1 else batch)
        book = Logbook(list(metrics), log_every, start, memory.get("log", ()))
        samples = max((x.shape[1 if fuse > 1 else 0] for x in jax.tree.leaves(batch)), default=0)
        keys = Raw.of(state)
        live = keys.strip(jax.tree.map(_copy, state))
        del state
        run = _compiled(step, fuse, keys)
        last = dict.fromkeys(range(len(callbacks) + 2), clock.now())
        compilations = 0
        evaluated = saved = -1

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
            if when is None or not when.due(done, clock.now() - last[slot]):
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
            signalled = None if stopped else should_stop()
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
        return Fit(state, stopped or signalled or ended, row, tuple(evals), clock.now() + before)
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


class _Clock:
    """Measure speed, leaving out compilation, evaluation and saving."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._mark = self._began
        self._excluded = 0.0
        self._compile = 0.0
        self._step = 0
        self._waited = 0.0

    def now(self) -> float:
        return time.perf_counter() - self._began

    def start(self, step: int) -> None:
        self._step = step
        self._mark = time.perf_counter()

    def compiled(self) -> int:
        """Take what has passed since :meth:`start` as the time of the first compilation."""
        self._compile = time.perf_counter() - self._mark
        self._excluded += self._compile
        return 1

    def paused(self) -> "_Pause":
        return _Pause(self)

    def exclude(self, seconds: float) -> None:
        self._excluded += seconds

    def timing(self, step: int, samples: int, waited: float, before: float) -> dict[str, float]:
        now = time.perf_counter()
        seconds = max(now - self._mark - self._excluded, 1e-9)
        speed = (step - self._step) / seconds
        wait = min(max((waited - self._waited) / seconds, 0.0), 1.0)
        self._mark, self._step, self._waited, self._excluded = now, step, waited, 0.0
        return {
            "steps_per_second": speed,
            "samples_per_second": speed * samples,
            "data_wait": wait,
            "compile_seconds": self._compile,
            "seconds": now - self._began + before,
        }


class _Pause:
    def __init__(self, clock: _Clock):
        self._clock = clock

    def __enter__(self) -> None:
        self._from = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._clock.exclude(time.perf_counter() - self._from)
