"""What the Mosaic GPU kernels share: products of tiles, masks, and a stream through shared memory.

A kernel has three warpgroups. Two compute, each for 64 rows of its own; the third copies the tiles
that both of them read into a ring of slots, a few steps ahead.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fnml.pallas_kernels.attention._tiles import Plan, in_window

COMPUTE = 2
"""Warpgroups that compute."""

SLOTS = 2
"""Tiles of each stream that shared memory holds at once."""


def div(x: Any, by: int) -> jax.Array:
    """Divide a number of 0 or more, rounding down."""
    return lax.div(jnp.asarray(x, jnp.int32), jnp.int32(by))


def product(a: Any, b: Any, onto: jax.Array | None = None, *, interpret: Any) -> jax.Array:
    """Return the float32 product of tiles, added to ``onto``; ``b`` is a reference, ``a`` may be.

    The GPU interpreter knows no product with transposed references or registers: there the tiles
    are read and multiplied by XLA.
    """
    if interpret:
        left = a if isinstance(a, jax.Array) else a[...]
        right = b.of[...].T if isinstance(b, Transposed) else b[...]
        out = jnp.dot(left, right, preferred_element_type=jnp.float32)
        return out if onto is None else onto + out
    ref = plgpu.transpose_ref(b.of, (1, 0)) if isinstance(b, Transposed) else b
    if onto is not None:
        return pl.run_state(lambda acc: plgpu.wgmma(acc, a, ref))(plgpu.ACC.init(onto))
    shape: Any = (a.shape[0], ref.shape[1])

    def fresh(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, a, ref)
        return acc[...]

    return pl.run_scoped(fresh, plgpu.ACC(shape, jnp.float32))


class Transposed(NamedTuple):
    """Says that a reference is meant transposed."""

    of: Any


def hidden(
    plan: Plan, scores: jax.Array, query: Any, key: Any, *, keys_first: bool = False
) -> jax.Array:
    """Return scores with -inf where a key is out of a query's reach.

    ``query`` and ``key`` are the positions of the tile's first ones.
    """
    axes = (1, 0) if keys_first else (0, 1)
    queries = query + plgpu.broadcasted_iota(jnp.int32, scores.shape, axes[0])
    keys = key + plgpu.broadcasted_iota(jnp.int32, scores.shape, axes[1])
    seen = in_window(plan, queries, keys)
    return scores if seen is None else jnp.where(seen, scores, -jnp.inf)


def reach(plan: Plan, start: Any, size: int, tile: int, tiles: int) -> tuple[Any, Any]:
    """Return the range of tiles of keys that ``size`` queries from ``start`` may see."""
    first, stop = jnp.int32(0), jnp.int32(tiles)
    if plan.left is not None:
        first = jnp.minimum(div(jnp.maximum(start - plan.left, 0), tile), tiles)
    if plan.right is not None:
        stop = jnp.minimum(div(start + size - 1 + plan.right, tile) + 1, tiles)
    return first, stop


def reach_back(plan: Plan, start: Any, size: int, tile: int, tiles: int) -> tuple[Any, Any]:
    """Return the range of tiles of queries that may see ``size`` keys from ``start``."""
    return reach(plan._replace(left=plan.right, right=plan.left), start, size, tile, tiles)


class Stream(NamedTuple):
    """A ring of tiles in shared memory, with a barrier for "full" and one for "free" per slot."""

    tiles: Any
    full: Any
    free: Any

    @staticmethod
    def scratch(shape: tuple[int, ...], dtype: Any) -> "Stream":
        """Describe the memory and the barriers of a stream of tiles of ``shape``."""
        return Stream(
            plgpu.SMEM((SLOTS, *shape), dtype),
            plgpu.Barrier(num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=SLOTS),
        )

    def take(self, step: Any) -> Any:
        """Wait for the tile of a step, and return a reference to it."""
        slot = lax.rem(step, jnp.int32(SLOTS))
        plgpu.barrier_wait(self.full.at[slot])
        return self.tiles.at[slot]

    def give_back(self, step: Any, steps: Any) -> None:
        """Say that this warpgroup has read the tile of a step, if another will want its slot."""

        @pl.when(step + SLOTS < steps)
        def _() -> None:
            plgpu.barrier_arrive(self.free.at[lax.rem(step, jnp.int32(SLOTS))])


def pump(streams: Sequence[tuple[Stream, Callable[[Any], Any]]], steps: Any) -> None:
    """Copy the tiles of all steps into their rings, waiting for free slots."""

    def copy(step: Any, slot: Any) -> None:
        for stream, source in streams:
            plgpu.copy_gmem_to_smem(source(step), stream.tiles.at[slot], stream.full.at[slot])

    for slot in range(SLOTS):
        pl.when(slot < steps)(partial(copy, jnp.int32(slot), slot))

    @pl.loop(SLOTS, steps)
    def _(step: Any) -> None:
        slot = lax.rem(step, jnp.int32(SLOTS))
        for stream, _ in streams:
            plgpu.barrier_wait(stream.free.at[slot])
        copy(step, slot)


def fetch(pairs: Sequence[tuple[Any, Any]], barrier: Any) -> None:
    """Copy several arrays into shared memory, one after another, and wait for each."""
    for source, target in pairs:
        plgpu.copy_gmem_to_smem(source, target, barrier)
        plgpu.barrier_wait(barrier)
