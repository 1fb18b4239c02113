"""Save the state of a run while the run goes on."""

import errno
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np

from fnml.checkpoint._manifest import JSON_LIMIT
from fnml.checkpoint._retention import Best, best_steps, kept_steps
from fnml.checkpoint._steps import clean, committed, delete, temporary
from fnml.checkpoint._tree import Leaf, describe, named_leaves, size_in_bytes, to_host
from fnml.checkpoint._verify import read_manifest
from fnml.checkpoint._write import write_step
from fnml.core import CheckpointError, ConfigError

PyTree = Any

# What Orbax's metadata and our manifest take beside the arrays: about 1 kB per array, and a rest.
_OVERHEAD_PER_ARRAY = 1024
_OVERHEAD = 64 * 1024


class Checkpointer:
    """Save steps into a directory: verified, atomic, in the background, the last and best kept.

    A save blocks for one copy of the state to the host; a thread then writes it with Orbax, hashes
    and syncs every file, writes the manifest, and renames the whole into place. Killed at any
    instant, a step is there as a whole or not at all; :func:`restore` reads it back. The copy's
    host memory, as much as the state has, is kept and reused. Use one Checkpointer per directory,
    as a context manager, so that the last write is waited for.

    Args:
      directory: made if it is not there; leftovers of processes that are gone are removed.
      keep_last: how many of the last steps to keep, at least 1.
      keep_best: how many of the best steps by metric to keep as well.
      best: whether a small or a large metric is good. NaN and infinities never are; of equal
        metrics the earlier step is better.

    Attributes:
      directory: where the steps are.
      blocked: seconds that the caller has spent in :meth:`save` so far, waiting for the save before
        and copying; what the state's own computation took is not in it.

    Raises:
      ConfigError: an argument is out of range.
      CheckpointError: the directory cannot be made, read or cleaned.

    >>> import tempfile, jax.numpy as jnp
    >>> with Checkpointer(tempfile.mkdtemp(), keep_last=1) as checkpointer:
    ...     for step, loss in [(10, 0.3), (20, 0.1), (30, 0.2)]:
    ...         checkpointer.save(step, {"w": jnp.ones(3)}, {}, metric=loss)
    ...     checkpointer.wait()
    ...     checkpointer.steps(), checkpointer.best(), checkpointer.latest()
    ([20, 30], 20, 30)
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int = 3,
        keep_best: int = 1,
        best: Best = "min",
    ) -> None:
        faults = [
            *([f"keep_last is {keep_last}, expected at least 1"] if keep_last < 1 else []),
            *([f"keep_best is {keep_best}, expected at least 0"] if keep_best < 0 else []),
            *([f"best is {best!r}, expected 'min' or 'max'"] if best not in ("min", "max") else []),
        ]
        if faults:
            raise ConfigError("; ".join(faults))
        # Absolute: a later change of the working directory must not move the background thread.
        self.directory = Path(directory).absolute()
        self.blocked = 0.0
        self._keep_last, self._keep_best, self._best = keep_last, keep_best, best
        self._buffers: dict[str, np.ndarray] = {}
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._closed = False
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            clean(self.directory)
        except OSError as error:
            raise CheckpointError(f"{directory} cannot hold checkpoints: {error}") from error

    def save(
        self, step: int, state: PyTree, meta: Mapping[str, Any], *, metric: float | None = None
    ) -> None:
        """Save a step; when this returns the state may be donated or overwritten.

        Args:
          step: the step's number; a step saved under it before is replaced.
          state: any tree of arrays, typed keys included.
          meta: what else belongs to the step, as JSON: ``dict`` with text keys, ``list`` (a tuple
            comes back as one), text, finite numbers, booleans and ``None``.
          metric: what "best" goes by.

        Raises:
          CheckpointError: the save before failed (then this one was not begun: save again), the
            disk has not enough room, or the Checkpointer is closed.
          ConfigError: ``step`` is negative, or ``meta`` is no JSON.
          ShapeError: ``state`` holds something other than arrays, or arrays of other processes.
        """
        if self._closed:
            raise CheckpointError(f"step {step} was not saved: this Checkpointer is closed")
        if step < 0:
            raise ConfigError(f"step is {step}, expected at least 0")
        text = _meta_text(meta)
        leaves = named_leaves(state)
        tree = describe(leaves)
        jax.block_until_ready(state)

        start = time.perf_counter()
        try:
            self.wait()
            size = size_in_bytes(leaves)
            need = size + len(text) + _OVERHEAD + _OVERHEAD_PER_ARRAY * len(leaves)
            self._check_room(step, need)
            self._buffers = to_host(leaves, self._buffers)
            self._thread = threading.Thread(
                target=self._write,
                args=(int(step), need, tree, text, _finite(metric)),
                name=f"fnml-checkpoint-{step}",
            )
            self._thread.start()
        finally:
            self.blocked += time.perf_counter() - start

    def check(self) -> None:
        """Raise the error of a background save that failed, without waiting for one at work.

        Raises:
          CheckpointError: see :meth:`save`; each failure is raised once.
        """
        if self._thread is not None and self._thread.is_alive():
            return
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait until the save at work is durable.

        Raises:
          CheckpointError: it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Wait for the save at work and end; closing again does nothing.

        Raises:
          CheckpointError: the last save failed.
        """
        self._closed = True
        try:
            self.wait()
        finally:
            self._buffers = {}

    def steps(self) -> list[int]:
        """Return the committed steps, in ascending order."""
        return list(committed(self.directory))

    def latest(self) -> int | None:
        """Return the last committed step, or ``None``."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Return the committed step with the best metric, or ``None`` if none has one."""
        return next(iter(best_steps(self._metrics(), 1, self._best)), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except CheckpointError as error:
            # The error that ended the block matters more than a lost save.
            if value is None:
                raise
            value.add_note(f"Besides, {error}")

    def _write(
        self, step: int, need: int, tree: Mapping[str, Leaf], meta: bytes, metric: float | None
    ) -> None:
        """Write the copied state and delete old steps, in the background thread."""
        try:
            write_step(self.directory, step, self._buffers, tree, meta, metric)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets it
            shutil.rmtree(temporary(self.directory, step), ignore_errors=True)
            # What failed may have left other writes at work that still read this memory.
            self._buffers = {}
            self._error = self._failure(step, need, error)
            return
        try:
            self._prune(step)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets it
            self._error = CheckpointError(
                f"step {step} was saved, but older steps could not be deleted: {error}"
            )
            self._error.__cause__ = error

    def _prune(self, saved: int) -> None:
        metrics = self._metrics()
        kept = kept_steps(
            metrics,
            saved=saved,
            keep_last=self._keep_last,
            keep_best=self._keep_best,
            best=self._best,
        )
        paths = committed(self.directory)
        for step in sorted(metrics.keys() - kept):
            delete(self.directory, step, paths[step])

    def _metrics(self) -> dict[int, float | None]:
        """Return the metric of each step whose manifest can be read; others are left alone."""
        metrics = {}
        for step, path in committed(self.directory).items():
            try:
                metrics[step] = read_manifest(path, step).metric
            except ValueError:
                continue
        return metrics

    def _check_room(self, step: int, need: int) -> None:
        try:
            free = shutil.disk_usage(self.directory).free
        except OSError as error:
            raise self._failure(step, need, error) from error
        if free < need:
            raise self._failure(step, need, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    def _failure(self, step: int, need: int, cause: Exception) -> CheckpointError:
        room = ""
        if "No space left" in str(cause):
            free = shutil.disk_usage(self.directory).free
            room = f" It needs {need:,} bytes and {free:,} are free: make room or keep fewer steps."
        error = CheckpointError(
            f"step {step} was not saved in {self.directory}; earlier steps are unharmed. "
            f"{type(cause).__name__}: {cause}.{room}"
        )
        error.__cause__ = cause
        return error


def _finite(metric: float | None) -> float | None:
    return float(metric) if metric is not None and math.isfinite(metric) else None


def _meta_text(meta: Mapping[str, Any]) -> bytes:
    faults = _not_json(meta, "meta")
    if faults:
        raise ConfigError("meta has to be JSON:\n" + "\n".join(faults))
    text = json.dumps(dict(meta), indent=1).encode() + b"\n"
    if len(text) > JSON_LIMIT:
        raise ConfigError(f"meta takes {len(text):,} bytes as JSON, at most {JSON_LIMIT:,} may be")
    return text


def _not_json(value: Any, where: str) -> list[str]:
    """List what JSON would refuse, or silently change, by path."""
    if isinstance(value, Mapping):
        keys = [f"  {where}: the key {key!r} is no text" for key in value if type(key) is not str]
        return keys + [f for key, item in value.items() for f in _not_json(item, f"{where}/{key}")]
    if isinstance(value, list | tuple):
        return [f for i, item in enumerate(value) for f in _not_json(item, f"{where}/{i}")]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"  {where}: {value} has no word in JSON"]
    if value is None or isinstance(value, str | bool | int | float):
        return []
    return [f"  {where}: {type(value).__name__} is no JSON type"]
