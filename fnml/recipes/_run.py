"""Start a run, take it up again, and read a trained model back."""

import contextlib
import dataclasses
import functools
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

import fnml
from fnml import sinks
from fnml.checkpoint import Checkpointer, restore, restore_meta, tree_sha256
from fnml.core import (
    CheckpointError,
    Row,
    RunError,
    Sink,
    State,
    peak_memory,
)
from fnml.parallel import Processes, gathered
from fnml.recipes._config_json import from_json, to_json
from fnml.recipes._plugins import find_recipe
from fnml.recipes._recipe import Output, Task
from fnml.recipes._run_directory import (
    create,
    locked,
    new_directory,
    read_record,
    read_result,
    sweep,
    write_result,
)
from fnml.recipes._sinks import check_sinks, open_sink
from fnml.recipes._together import announce, check_equal, join, shared
from fnml.recipes._training import (
    abstract_state,
    as_configured,
    check_config,
    drawing,
    initial_state,
    make_step,
    placed,
    prepare,
    read_config,
)
from fnml.train import (
    Every,
    Fit,
    early_stopping,
    evaluator,
    fit,
    means,
    stop_on_signals,
)

PyTree = Any
_LOG = logging.getLogger("fnml")


class Loaded(NamedTuple):
    """A trained model, read back from its run.

    Attributes:
      task: what the run's configuration builds.
      state: abstract before training, restored after.
      step: the step of the checkpoint.
    """

    task: Task
    state: State
    step: int


class Finished(NamedTuple):
    """How a run ended.

    Attributes:
      directory: the run's.
      result: as in its ``result.json``.
      signal: what stopped the run before its end, if a signal did.
      first: whether this is the process to speak of it, where there are several.
    """

    directory: Path
    result: dict[str, Any]
    signal: str | None
    first: bool = True


def environment() -> dict[str, Any]:
    """Say on what a run happens; results repeat bit for bit only where all of it is equal."""
    import jaxlib
    import numpy as np
    import optax

    return {
        "fnml": fnml.__version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "optax": optax.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
    }


def start(name: str, config: Any, directory: Path | None, output: Output) -> Finished:
    """Train a recipe from the beginning, in a new run directory; ``None`` for one below runs/.

    Everything that can be refused is refused before the directory is made.

    Raises:
      FnmlError: the recipe, its configuration or its data cannot be used; the directory holds
        another run; the loss became NaN or infinite.
    """
    recipe = find_recipe(name)
    processes = join(config)
    prepare(config)
    task = recipe.build(config, None)
    check_sinks(output)
    step = make_step(task, config)
    with drawing(task, config) as drawn:
        _check_trainable(step, task, config)
        record = {
            "recipe": name,
            "config": to_json(config),
            "output": to_json(output),
            "environment": environment(),
        }
        if processes.first:
            directory = new_directory(Path("runs"), name) if directory is None else directory
            announce(processes, directory, config)
            create(directory, record, task.files)
        directory = Path(processes.share("directory", str(directory)))
        return _train(processes, task, step, name, config, directory, output, drawn, fresh=True)


def resume(
    directory: Path,
    output: Output | None = None,
    *,
    devices: int | None = None,
    mesh: str | None = None,
    rules: str | None = None,
) -> Finished:
    """Continue a run from its newest checkpoint, or from the beginning if it has none.

    Law: the final parameters, and the rows of metrics, have the bits of an uninterrupted run, on
    any number of devices; on another mesh they are equal to rounding.

    Args:
      directory: the run's.
      output: where its record goes; by default as before.
      devices: how many devices to share the batch's shards, this time; by default as at the start.
      mesh: the axes that the compiler divides along this time; by default as at the start.
      rules: what lies along which of them; by default as at the start.

    Raises:
      RunError: there is no run in the directory, or it has finished.
      CheckpointError: the checkpoints are damaged, or of another configuration.
      ConfigError: the shards cannot be shared by so many devices, or there are fewer.
    """
    record = read_record(directory)
    finished = read_result(directory)
    if finished is not None:
        raise RunError(
            f"the run {directory} has finished ({finished.get('step')} steps): there is nothing "
            f"to resume. 'fnml eval {directory}' and 'fnml sample {directory}' use it"
        )
    recipe, config = read_config(record)
    asked = {"devices": devices, "mesh": mesh, "rules": rules}
    given = {name: value for name, value in asked.items() if value is not None}
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, **given))
    kept = output or from_json(Output, record["output"])
    processes = join(config)
    prepare(config)
    check_sinks(kept)
    _warn_of_changes(record)
    announce(processes, directory, config)
    task = recipe.build(config, directory)
    step = make_step(task, config)
    draw = functools.partial(initial_state, task, config)
    return _train(
        processes, task, step, record["recipe"], config, directory, kept, draw, fresh=False
    )


def load(directory: Path, step: int | None = None) -> Loaded:
    """Read a run's model back, from the checkpoint of ``step`` or the newest one.

    Raises:
      RunError: there is no run in the directory.
      CheckpointError: there is no checkpoint, or it is damaged.
    """
    record = read_record(directory)
    recipe, config = read_config(record)
    task = recipe.build(config, directory)
    found = restore(directory / "checkpoints", abstract_state(task, config), step=step)
    return Loaded(task, found.state, found.step)


def evaluate(loaded: Loaded) -> dict[str, float]:
    """Evaluate a model on its recipe's held-out set."""
    return means(evaluator(loaded.task.eval_loss_fn, loaded.task.held_out)(loaded.state))


def _warn_of_changes(record: Mapping[str, Any]) -> None:
    before, now = record.get("environment"), environment()
    if not isinstance(before, Mapping):
        return
    changed = [
        f"{name} was {before[name]}, is {value}"
        for name, value in now.items()
        # The kernel's version, in the platform's text, decides no bits, nor does how many devices
        # of a kind there are.
        if name != "platform" and name in before and _kinds(before[name]) != _kinds(value)
    ]
    if changed:
        _LOG.warning(
            "this run began elsewhere, so its result may not have the bits of an uninterrupted "
            "one: %s",
            "; ".join(changed),
        )


def _kinds(value: Any) -> Any:
    return sorted(map(str, set(value))) if isinstance(value, list) else value


def _check_trainable(step: Any, task: Task, config: Any) -> None:
    """Trace one step on shapes, so that a wrong configuration leaves nothing behind."""
    from fnml.train import check_step

    check_step(step, abstract_state(task, config), task.train.at(task.train.position))


def _train(
    processes: Processes,
    task: Task,
    step: Any,
    name: str,
    config: Any,
    directory: Path,
    output: Output,
    draw: Callable[[], State],
    *,
    fresh: bool,
) -> Finished:
    run = config.run
    metric, mode = task.best
    with contextlib.ExitStack() as stack:
        checkpoints = directory / "checkpoints"
        keeper = None
        if processes.first:
            stack.enter_context(locked(directory))
            sweep(directory)
            checkpoints.mkdir(exist_ok=True)
            keeper = stack.enter_context(
                Checkpointer(
                    checkpoints, keep_last=run.keep_last, keep_best=run.keep_best, best=mode
                )
            )
        any_saved = keeper is not None and not fresh and bool(keeper.steps())
        state, memory, batches = _where_to_start(
            processes, task, config, checkpoints, draw, any_saved
        )
        begun = int(state.step)
        announce(processes, directory, config, begun)
        outputs: list[Sink] = []
        note: Callable[[str], None] = _LOG.warning if processes.first else _LOG.info
        if not output.quiet and processes.first:
            console = sinks.Console(run.steps, stream=sys.stderr, start=begun)
            stack.callback(console.close)
            outputs.append(console)
            note = console.note
        for sink_name in output.sinks if processes.first else ():
            # Taken up again from the beginning, a run writes all of its rows anew.
            after = None if fresh else begun or -1
            sink = open_sink(sink_name, directory, after, output)
            stack.callback(sink.close)
            outputs.append(sink)
            if isinstance(sink, sinks.Prometheus) and not output.quiet:
                note(f"serving http://127.0.0.1:{sink.port}/metrics")
        signalled = stack.enter_context(stop_on_signals())

        def should_stop() -> str | None:
            # A save that failed in the background ends the run now, not when the next one is due.
            if keeper is not None:
                keeper.check()
            return signalled()

        callbacks = []
        if run.patience:
            stopping = early_stopping(metric, patience=run.patience, mode=mode)
            callbacks.append((Every(steps=run.eval_every), stopping))

        def save(state: State, meta: dict[str, Any], value: float | None) -> None:
            meta["config"] = to_json(config)
            whole = gathered(state)
            if keeper is not None:
                keeper.save(int(state.step), whole, meta, metric=value)

        def held_out() -> Iterator[Any]:
            for batch in task.held_out():
                processes.beat()
                yield batch

        outcome = fit(
            step,
            state,
            batches,
            steps=run.steps,
            fuse=run.fuse or ("auto" if processes.count == 1 else 1),
            log_every=run.log_every,
            # A sink that fails for a while must not end a run of a week.
            sinks=[sinks.tee(outputs)],
            evaluate=evaluator(as_configured(task.eval_loss_fn, config), held_out),
            eval_every=Every(steps=run.eval_every),
            callbacks=callbacks,
            save=save,
            save_every=Every(steps=run.save_every, minutes=run.save_minutes),
            save_metric=metric,
            should_stop=should_stop,
            agree=processes.agree if processes.watched or processes.count > 1 else None,
            resume=memory,
            note=note,
        )
        if keeper is not None:
            keeper.wait()
        signal = outcome.stopped if outcome.stopped in ("SIGINT", "SIGTERM") else None
        result = _result(name, outcome)
        check_equal(processes, result["params_sha256"])
        if signal is None and processes.first:
            write_result(directory, result)
        processes.share("ended", True)
        return Finished(directory, result, signal, processes.first)


def _where_to_start(
    processes: Processes,
    task: Task,
    config: Any,
    checkpoints: Path,
    draw: Callable[[], State],
    any_saved: bool,
) -> tuple[State, Mapping[str, Any] | None, Any]:
    if not processes.share("any_saved", any_saved):
        state = placed(draw(), task, config)
        return state, None, shared(processes, task.train, config)
    target, alone = abstract_state(task, config), processes.count == 1
    try:
        # Process 0 finds the newest whole step; the others take the same.
        step = None if processes.first else processes.share("step")
        found = restore(checkpoints, placed(target, task, config) if alone else target, step=step)
    except CheckpointError:
        # A field's name says more than the arrays that do not fit because of it.
        check_config(restore_meta(checkpoints), config)
        raise
    check_config(found.meta, config)
    if processes.first:
        processes.share("step", found.step)
    state = found.state if alone else placed(found.state, task, config)
    return state, found.meta, shared(processes, task.train.resume(found.meta["data"]), config)


def _json_values(row: Row | None) -> dict[str, float]:
    return dict(row.values) if row is not None else {}


def _result(name: str, outcome: Fit) -> dict[str, Any]:
    return {
        "recipe": name,
        "step": int(outcome.state.step),
        "stopped": outcome.stopped,
        "train": _json_values(outcome.row),
        "eval": _json_values(outcome.evals[-1] if outcome.evals else None),
        "seconds": round(outcome.seconds, 3),
        "fuse": outcome.fuse,
        "peak_memory": peak_memory(),
        "params_sha256": tree_sha256(gathered(outcome.state.params)),
        "environment": environment(),
    }
