"""How many rows a tile has, and from which size on a kernel is worth its call."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fnml.pallas_kernels._compiler import hopper_faults
from fnml.pallas_kernels.native import faults_of

WIDEST = 32_768
"""The widest row for which eight of them, buffered twice, fit into the memory of a core."""

_TILE = 512 * 1024
"""Bytes of float32 in one tile: its arrays, twice each, stay below 12 MiB."""


def worth(x: jax.Array) -> bool:
    """Tell whether "auto" uses a kernel: whole lanes, and 32 MiB or more.

    Less than that XLA can keep on the chip between the norm and the operations around it.
    """
    return x.shape[-1] % 128 == 0 and x.size * x.dtype.itemsize >= 2**25


def tile_rows(rows: int, width: int) -> int:
    """Return the rows of a tile: all of them, or a multiple of 8 up to 1,024.

    >>> tile_rows(4096, 1024), tile_rows(4096, 100), tile_rows(3, 1024)
    (128, 1024, 3)
    """
    fit = max(8, min(1024, _TILE // (4 * width) // 8 * 8))
    return min(rows, fit)


def vmem_limit(rows: int, width: int) -> int:
    """Return what one core may use: seven arrays buffered twice and the temporaries."""
    return max(16 * 2**20, 24 * 4 * max(rows, 8) * max(width, 128))


class RowBlocks(NamedTuple):
    """How the GPU bodies divide rows.

    Attributes:
      blocks: blocks of threads; each takes every ``blocks``-th row.
      part: the width of a part of a row, which divides it.
    """

    blocks: int
    part: int


CUDA_PART = 4096
"""The widest part of a row whose numbers fit into a warpgroup's registers (test_compiled)."""

CUDA_WIDEST = 16_384
"""The widest row for which float32 gradients of scale and bias fit into shared memory."""

CUDA_CORES = 132
"""Streaming multiprocessors of an H100 or H200."""

# Numbers of every array that the blocks on one core work on at a time: enough loads to hide the
# memory's latency, by an estimate. The backward pass also writes a vector for each block.
CUDA_FORWARD = 16_384
CUDA_BACKWARD = 8_192


def cuda_part(width: int) -> int | None:
    """Return the width of the parts of a row on a GPU, or ``None`` where it has none.

    >>> cuda_part(1280), cuda_part(5120), cuda_part(16384), cuda_part(100)
    (1280, 2560, 4096, None)
    """
    if width > CUDA_WIDEST:
        return None
    counts = range(-(-width // CUDA_PART), width // 256 + 1)
    return next((width // n for n in counts if width % (256 * n) == 0), None)


def cuda_rows(shape: tuple[int, ...], numbers: int) -> RowBlocks:
    """Divide [rows, width] so that about ``numbers`` of every array are at work on each core.

    >>> cuda_rows((8192, 4096), CUDA_FORWARD), cuda_rows((5, 1024), CUDA_FORWARD)
    (RowBlocks(blocks=528, part=4096), RowBlocks(blocks=5, part=1024))
    """
    rows, width = shape
    part = cuda_part(width)
    assert part is not None
    return RowBlocks(min(rows, CUDA_CORES * max(1, numbers // width)), part)


def refusals(x: jax.Array) -> dict[str, list[str]]:
    """Say for each body of a norm why it cannot run on ``x``; an empty list if it can."""
    tpu, cuda = [], hopper_faults()
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        tpu.append(f"x is {x.dtype}, expected float32 or bfloat16")
    if x.size == 0 or x.shape[-1] > WIDEST:
        tpu.append(f"x is {x.shape}, expected some rows of at most {WIDEST} numbers")
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        cuda.append(f"x is {x.dtype}, expected float32, bfloat16 or float16")
    if x.size == 0 or cuda_part(x.shape[-1]) is None:
        cuda.append(
            f"x is {x.shape}, expected some rows of a multiple of 256 numbers that divides into "
            f"such parts of at most {CUDA_PART}, up to {CUDA_WIDEST}"
        )
    return {"tpu": tpu, "cuda": cuda, "native": faults_of(x=x)}
