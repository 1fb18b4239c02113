"""What attention's Mosaic GPU kernels share beside products and streams: masks and reaches.

Two warpgroups compute, each for 64 rows of its own; the third copies the tiles that both read.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from fnml.pallas_kernels._hopper import div
from fnml.pallas_kernels.attention._tiles import Plan, in_window

COMPUTE = 2
"""Warpgroups that compute."""


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
