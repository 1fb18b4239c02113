"""A small run for the tests of fit: its step, its data, and what it must come to."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnml.core import Mean, Metrics, Row, State
from fnml.train import evaluator, train_step

PyTree = Any
TOTAL = 20
_rng = np.random.default_rng(0)
X = _rng.normal(size=(TOTAL, 4, 3)).astype(np.float32)
Y = _rng.normal(size=(TOTAL, 4)).astype(np.float32)
W = _rng.integers(1, 4, (TOTAL, 4)).astype(np.float32)
BATCHES = [{"x": x, "y": y, "w": w} for x, y, w in zip(X, Y, W, strict=True)]
OPTIMIZER = optax.sgd(0.05, 0.9)


def loss_fn(params: PyTree, batch: PyTree, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
    """Return a weighted squared error, with noise from the key in training."""
    error = batch["x"] @ params["w"] - batch["y"]
    if key is not None:
        error = error + 0.1 * jax.random.normal(key, error.shape)
    loss = Mean.of(error**2, batch["w"])
    return loss.value, Metrics(loss.weight, {"size": Mean.of(jnp.abs(error))})


STEP = train_step(jax.value_and_grad(loss_fn, has_aux=True), OPTIMIZER)
evaluate = evaluator(loss_fn, lambda: BATCHES[:2])


def start() -> State:
    """Return the state at step 0."""
    return State.create({"w": jnp.ones(3)}, OPTIMIZER, jax.random.key(1))


@functools.cache
def by_hand() -> tuple[list[State], list[dict[str, tuple[float, float]]]]:
    """Return the state after 0, 1, ... steps of a plain loop, and every step's metrics."""
    step, states, rows = jax.jit(STEP), [start()], []
    for batch in BATCHES:
        state, metrics = step(states[-1], batch)
        states.append(state)
        rows.append({name: (float(m.total), float(m.weight)) for name, m in metrics.items()})
    return states, rows


def expected_row(first: int, last: int) -> dict[str, float]:
    """Return the means over the steps ``first + 1 .. last`` of the plain loop, in float64."""
    rows = by_hand()[1][first:last]
    return {
        name: sum(row[name][0] for row in rows) / sum(row[name][1] for row in rows)
        for name in rows[0]
    }


def bits(tree: PyTree) -> list[bytes]:
    """Return every leaf's bytes."""

    def raw(x: Any) -> Any:
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return [np.asarray(raw(x)).tobytes() for x in jax.tree.leaves(tree)]


class Memory:
    """A sink and a checkpoint store that remembers what happened, in order."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.rows: list[Row] = []
        self.saved: dict[int, tuple[State, str, float | None]] = {}

    def write(self, row: Row) -> None:
        self.rows.append(row)
        self.events.append((row.kind, row.step))

    def flush(self) -> None:
        self.events.append("flush")

    def close(self) -> None:
        raise AssertionError("the sinks belong to the caller")

    def save(self, state: State, meta: dict[str, Any], metric: float | None) -> None:
        step = int(state.step)
        copy = jax.tree.map(lambda x: x.copy(), state)
        self.saved[step] = (copy, json.dumps(meta, allow_nan=False), metric)
        self.events.append(("save", step))

    @property
    def values(self) -> list[tuple[str, int, dict[str, float]]]:
        return [(row.kind, row.step, dict(row.values)) for row in self.rows]

    def until(self, step: int) -> "Memory":
        """Return a copy as it is found on disk by a run that resumes at ``step``."""
        copy = Memory()
        copy.rows = [row for row in self.rows if row.step <= step]
        return copy
