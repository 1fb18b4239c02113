"""How many rows a tile has, and from which size on a kernel is worth its call."""

import jax

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
