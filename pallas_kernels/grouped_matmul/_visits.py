"""Which tile of rows meets which group's matrix, in what order."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Visits(NamedTuple):
    """One entry for each turn of the loop, int32 [V].

    A tile of rows is visited once for each group that has rows in it, in order, so that turns
    which write to one tile, or add to one group's gradient, follow one another. V is static, the
    number of tiles and of groups; turns left over repeat the last one and own no rows.

    Attributes:
      group: the group whose matrix is used.
      tile: the tile of rows.
      start: the first row of the tile's that belongs to the group.
      stop: one past the last; equal to ``start`` where a turn only clears rows of no group.
    """

    group: jax.Array
    tile: jax.Array
    start: jax.Array
    stop: jax.Array


def plan(group_sizes: jax.Array, rows: int, tile: int) -> Visits:
    """Plan the visits of ``rows`` rows in tiles; rows beyond the groups' sum belong to none."""
    E = group_sizes.shape[0]
    sizes = group_sizes.astype(jnp.int32)
    rest = jnp.maximum(rows - jnp.sum(sizes, dtype=jnp.int32), 0)
    sizes = jnp.concatenate([sizes, rest[None]])
    ends = jnp.minimum(jnp.cumsum(sizes, dtype=jnp.int32), rows)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    first = starts // tile
    count = jnp.where(ends > starts, (ends - 1) // tile - first + 1, 0)
    through = jnp.cumsum(count, dtype=jnp.int32)
    turn = jnp.arange(-(-rows // tile) + E, dtype=jnp.int32)
    real = jnp.minimum(turn, through[-1] - 1)
    group = jnp.searchsorted(through, real, side="right").astype(jnp.int32)
    at = first[group] + real - (through - count)[group]
    start = jnp.maximum(starts[group], at * tile)
    stop = jnp.minimum(ends[group], (at + 1) * tile)
    owned = (group < E) & (turn == real)
    # A row that belongs to no group is cleared by whoever comes to its tile first.
    return Visits(jnp.minimum(group, E - 1), at, start, jnp.where(owned, stop, start))
