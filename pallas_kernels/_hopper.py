"""What the kernels for Hopper share: products of tiles, and streams through shared memory.

A kernel has some warpgroups that compute, and one more that copies the tiles that all of them read
into a ring of slots, a few steps ahead.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def div(x: Any, by: Any) -> jax.Array:
    """Divide a number of 0 or more, rounding down."""
    return lax.div(jnp.asarray(x, jnp.int32), jnp.asarray(by, jnp.int32))


def product(a: Any, b: Any, onto: jax.Array | None = None, *, interpret: Any) -> jax.Array:
    """Return the float32 product of tiles, added to ``onto``.

    Both may be references, ``b`` has to be one; references may be :class:`Transposed`. The GPU
    interpreter knows no product with transposed references or registers: there the tiles are read
    and multiplied by XLA.
    """
    if interpret:
        out = jnp.dot(_value(a), _value(b), preferred_element_type=jnp.float32)
        return out if onto is None else onto + out
    left, right = (
        plgpu.transpose_ref(x.of, (1, 0)) if isinstance(x, Transposed) else x for x in (a, b)
    )
    if onto is not None:
        return pl.run_state(lambda acc: plgpu.wgmma(acc, left, right))(plgpu.ACC.init(onto))
    shape: Any = (left.shape[0], right.shape[1])

    def fresh(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, left, right)
        return acc[...]

    return pl.run_scoped(fresh, plgpu.ACC(shape, jnp.float32))


class Transposed(NamedTuple):
    """Says that a reference is meant transposed."""

    of: Any


def _value(x: Any) -> jax.Array:
    if isinstance(x, Transposed):
        return x.of[...].T
    return x if isinstance(x, jax.Array) else x[...]


class Stream(NamedTuple):
    """A ring of tiles in shared memory, with a barrier for "full" and one for "free" per slot."""

    tiles: Any
    full: Any
    free: Any

    @staticmethod
    def scratch(
        shape: tuple[int, ...], dtype: Any, *, slots: int = 2, readers: int = 2, parts: int = 1
    ) -> "Stream":
        """Describe the memory and the barriers of a ring of ``slots`` tiles of ``shape``.

        Each tile is copied in ``parts``, and read by ``readers`` warpgroups.
        """
        return Stream(
            plgpu.SMEM((slots, *shape), dtype),
            plgpu.Barrier(num_arrivals=parts, num_barriers=slots),
            plgpu.Barrier(num_arrivals=readers, num_barriers=slots),
        )

    def slot(self, step: Any) -> Any:
        """Return the slot of a step."""
        return lax.rem(step, jnp.int32(self.tiles.shape[0]))

    def take(self, step: Any) -> Any:
        """Wait for the tile of a step, and return a reference to it."""
        slot = self.slot(step)
        plgpu.barrier_wait(self.full.at[slot])
        return self.tiles.at[slot]

    def give_back(self, step: Any, steps: Any) -> None:
        """Say that this warpgroup has read the tile of a step, if another will want its slot."""

        @pl.when(step + self.tiles.shape[0] < steps)
        def _() -> None:
            plgpu.barrier_arrive(self.free.at[self.slot(step)])


def pump(streams: Sequence[tuple[Stream, Callable[[Any], Any]]], steps: Any) -> None:
    """Copy the tiles of all steps into their rings, of equally many slots, as slots become free.

    A step's source is a reference, or a list of them that fill the tile one after another.
    """
    slots = streams[0][0].tiles.shape[0]

    def copy(step: Any, slot: Any) -> None:
        for stream, source in streams:
            found, tile = source(step), stream.tiles.at[slot]
            if not isinstance(found, list):
                plgpu.copy_gmem_to_smem(found, tile, stream.full.at[slot])
                continue
            size = tile.shape[0] // len(found)
            for index, part in enumerate(found):
                target = tile.at[pl.ds(index * size, size)]
                plgpu.copy_gmem_to_smem(part, target, stream.full.at[slot])

    for slot in range(slots):
        pl.when(slot < steps)(partial(copy, jnp.int32(slot), slot))

    @pl.loop(slots, steps)
    def _(step: Any) -> None:
        slot = lax.rem(step, jnp.int32(slots))
        for stream, _ in streams:
            plgpu.barrier_wait(stream.free.at[slot])
        copy(step, slot)


def fetch(pairs: Sequence[tuple[Any, Any]], barrier: Any) -> None:
    """Copy several arrays into shared memory, one after another, and wait for each."""
    for source, target in pairs:
        plgpu.copy_gmem_to_smem(source, target, barrier)
        plgpu.barrier_wait(barrier)
