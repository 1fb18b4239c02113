"""Rebuild the exact state and batch of any step of a run."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnml import transforms
from fnml.checkpoint import restore, restore_meta, verify
from fnml.core import ConfigError, Mean, State, leaf_names
from fnml.data import Batch
from fnml.recipes._recipe import Task
from fnml.recipes._run_directory import read_record
from fnml.recipes._training import (
    abstract_state,
    check_config,
    initial_state,
    make_step,
    placed,
    prepare,
    read_config,
)
from fnml.train import means


class Replayed(NamedTuple):
    """One step of a run, as it was.

    Attributes:
      step: which step, counted from 1.
      state: the state before it.
      batch: what it learns from, on the host.
      examples: int64 ``[B]``, which examples of the source the batch holds.
      after: the state after it.
      metrics: its own metrics, ``loss`` among them.
      start: the step of the checkpoint that it was rebuilt from; 0 for the beginning.
    """

    step: int
    state: State
    batch: Batch
    examples: np.ndarray
    after: State
    metrics: dict[str, float]
    start: int


class Replayer:
    """Compute a run's steps again, with the very program that computed them.

    Args:
      directory: the run's.

    Raises:
      RunError: there is no run in the directory.
      ConfigError: the run's devices are not there.
    """

    def __init__(self, directory: Path) -> None:
        record = read_record(directory)
        recipe, self.config = read_config(record)
        prepare(self.config)
        self.directory = directory
        self.task: Task = recipe.build(self.config, directory)
        run = self.config.run
        step = make_step(self.task, self.config)
        # In a fused loop a step may round differently, if its operations break the law of fuse.
        # Measured, it is fused only where it does not.
        self._fuse = run.fuse or 1
        self._step = jax.jit(step if self._fuse == 1 else transforms.fuse(step, self._fuse))

    @functools.cached_property
    def steps(self) -> list[int]:
        """The steps of the undamaged checkpoints, in ascending order."""
        checkpoints = self.directory / "checkpoints"
        found = verify(checkpoints) if checkpoints.is_dir() else {}
        return [step for step, faults in found.items() if not faults]

    def state_at(self, step: int) -> State:
        """Return the state after ``step`` steps from its checkpoint; 0 is the beginning.

        Raises:
          CheckpointError: there is no such checkpoint, or it is of another configuration.
        """
        if step == 0:
            return placed(initial_state(self.task, self.config), self.task, self.config)
        checkpoints = self.directory / "checkpoints"
        check_config(restore_meta(checkpoints, step), self.config)
        target = placed(abstract_state(self.task, self.config), self.task, self.config)
        return restore(checkpoints, target, step=step).state

    def position(self, step: int) -> int:
        """Return where in the stream of examples step ``step`` (from 1) begins."""
        return self.task.train.position + (step - 1) * self.config.run.batch_size

    def batch(self, step: int) -> Batch:
        """Return the batch of step ``step`` (from 1)."""
        return self.task.train.at(self.position(step))

    def examples(self, step: int) -> np.ndarray:
        """Return which examples of the source step ``step`` (from 1) learns from, int64 ``[B]``."""
        first = self.position(step)
        positions = np.arange(first, first + self.config.run.batch_size, dtype=np.int64)
        return self.task.train.indices(positions)

    def advance(self, state: State, step: int) -> tuple[State, dict[str, float]]:
        """Do step ``step`` (from 1), which ``state`` stands before."""
        return self._run(state, step, 1)

    def forward(self, state: State, done: int, target: int) -> State:
        """Go on from ``done`` steps to ``target`` steps."""
        while done < target:
            count = min(self._fuse, target - done)
            state, _ = self._run(state, done + 1, count)
            done += count
        return state

    def _run(self, state: State, step: int, count: int) -> tuple[State, dict[str, float]]:
        if self._fuse == 1:
            state, metrics = self._step(state, self.batch(step))
            return state, means(metrics)
        block = self.task.train.take(self.position(step), count)
        padded = {
            name: np.concatenate([x, np.repeat(x[-1:], self._fuse - count, axis=0)])
            for name, x in block.items()
        }
        state, metrics = self._step(state, padded, jnp.int32(count))
        return state, means(_row(metrics, count - 1))


def _row(metrics: Mapping[str, Mean], row: int) -> dict[str, Mean]:
    return jax.tree.map(lambda x: x[row], dict(metrics))


def replay(directory: Path, step: int) -> Replayed:
    """Rebuild the state and the batch of any step of a run, from its newest checkpoint before it.

    Law: ``state`` and ``after`` have the bits that the run had before and after that step; nothing
    in the directory is changed.

    Args:
      directory: the run's.
      step: which step, counted from 1: the loss that the rows call "step 1" is that of step 1.

    Raises:
      ConfigError: the run has no such step.
      RunError: there is no run in the directory.
      CheckpointError: the checkpoints are of another configuration.
      DataError: the data is not what the run was trained on.
    """
    replayer = Replayer(directory)
    steps = replayer.config.run.steps
    if not 1 <= step <= steps:
        raise ConfigError(f"step={step}: the run has the steps 1 to {steps}")
    start = max((at for at in replayer.steps if at < step), default=0)
    if start:
        # Other data would give another state, silently.
        replayer.task.train.resume(restore_meta(directory / "checkpoints", start)["data"])
    state = replayer.forward(replayer.state_at(start), start, step - 1)
    after, metrics = replayer.advance(state, step)
    return Replayed(
        step, state, replayer.batch(step), replayer.examples(step), after, metrics, start
    )


def without_keys(tree: Any) -> dict[str, np.ndarray]:
    """Return a tree's arrays on the host by path, typed keys as their key data."""

    def host(x: Any) -> np.ndarray:
        key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if key else x)

    return {
        name: host(leaf) for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
    }
