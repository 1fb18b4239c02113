"""Block sizes, as data."""

from typing import Any, NamedTuple

import jax.numpy as jnp


def lax_block(T: int) -> int:
    """Return the number of queries per block of the lax body; measured on a two-core CPU."""
    return 64 if T <= 512 else 128


NATIVE_QUERIES = 16
"""Fewer queries are not worth the C++ body, whose tiles hold 64."""

BY_HEAD = 2048
"""From this many queries and keys on, the lax body goes head by head on a CPU."""

BY_HEAD_BLOCK = 256
"""The number of queries per block there: 2 MiB of scores at 2,048 keys, the cache of one core."""


class Blocks(NamedTuple):
    """Queries and keys per tile, forward and backward."""

    q: int
    k: int
    q_back: int
    k_back: int


# By the widest head that a row is for, and bytes per element. Larger tiles amortise the loads;
# these fit the 16 MiB of vector memory of a v5e with room for the double buffers (test_compiled).
TPU = {
    (128, 2): Blocks(512, 512, 512, 512),
    (128, 4): Blocks(512, 512, 256, 512),
    (256, 2): Blocks(256, 512, 256, 512),
    (256, 4): Blocks(256, 256, 256, 256),
}


class GPUBlocks(NamedTuple):
    """Rows of the streamed tiles: keys forward, keys and queries backward.

    Each of two warpgroups computes for ``ROWS`` rows of its own.
    """

    k: int
    k_back: int
    q_back: int


ROWS = 64
"""The height of one warpgroup's matrix product on Hopper."""

# By head width. 232,448 bytes of shared memory hold two steps of a stream beside the rows; the
# backward tiles are the largest that ptxas fits into registers without a spill (test_compiled).
CUDA = {64: GPUBlocks(128, 64, 64), 128: GPUBlocks(128, 64, 64)}

WORTH = 512
"""From this many queries and keys on "auto" uses a hand-written body. An estimate, unmeasured."""


def tpu_blocks(D: int, dtype: Any) -> Blocks:
    """Return the tile for a head of width D, up to 256."""
    width = min(w for w, _ in TPU if w >= D)
    return TPU[width, jnp.dtype(dtype).itemsize]
