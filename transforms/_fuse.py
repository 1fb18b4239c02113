"""Run several training steps in one dispatch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnml.core import LayoutError, ShapeError, State, map_with_name

PyTree = Any
Step = Callable[[State, PyTree], tuple[State, PyTree]]


def fuse(step: Step, count: int) -> Callable[..., tuple[State, PyTree]]:
    """Do up to ``count`` training steps in one compiled loop.

    For small models the time between steps (Python, dispatch) exceeds the time in them; one
    dispatch for many steps removes it.

    Law: ``fuse(step, k)(state, stack(batches))`` equals ``k`` calls of ``step``, bit for bit, with
    the metrics of every step; with ``steps=n`` it equals the first ``n`` calls.

    Args:
      step: ``step(state, batch) -> (state, metrics)``.
      count: the number of batches stacked.

    Returns:
      ``fused(state, batches, steps=count) -> (state, metrics)``. Leaves of ``batches`` are
      ``[count, B, ...]``, those of ``metrics`` ``[count, ...]``. ``steps`` may be traced: a block
      cut short for a checkpoint needs no second compilation; metrics beyond it are 0.

    Raises:
      LayoutError: ``count`` is below 1.
      ShapeError: a leaf's leading axis is not ``count`` (when called).

    >>> import jax.numpy as jnp
    >>> state, metrics = fuse(lambda state, x: (state + x, state), 3)(0, jnp.array([1, 2, 3]))
    >>> int(state), metrics.tolist()
    (6, [0, 1, 3])
    """
    if count < 1:
        raise LayoutError(f"fuse needs at least 1 step, got {count}")

    def fused(
        state: State, batches: PyTree, steps: jax.Array | int = count
    ) -> tuple[State, PyTree]:
        faults: list[str] = []

        def check(name: str, x: jax.Array) -> None:
            if x.ndim < 1 or x.shape[0] != count:
                faults.append(f"{name or 'batch'}: {x.shape}")

        map_with_name(check, batches)
        if faults:
            raise ShapeError(
                f"fuse({count}) takes batches stacked along a leading axis of {count}, got "
                + ", ".join(faults)
            )

        def batch_at(i: jax.Array) -> PyTree:
            return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), batches)

        state = jax.tree.map(jnp.asarray, state)
        _, shapes = jax.eval_shape(step, state, batch_at(jnp.int32(0)))
        recorded = jax.tree.map(lambda s: jnp.zeros((count, *s.shape), s.dtype), shapes)

        def body(i: jax.Array, carry: tuple[State, PyTree]) -> tuple[State, PyTree]:
            state, recorded = carry
            state, metrics = step(state, batch_at(i))
            return state, jax.tree.map(
                lambda rows, row: lax.dynamic_update_index_in_dim(rows, row, i, 0),
                recorded,
                metrics,
            )

        last = jnp.minimum(jnp.asarray(steps, jnp.int32), count)
        return lax.fori_loop(jnp.int32(0), last, body, (state, recorded))

    return fused
