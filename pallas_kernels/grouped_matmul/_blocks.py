"""How rows and matrices are cut."""

from typing import NamedTuple


def lax_tile(rows: int, groups: int) -> int:
    """Return the rows of a tile of the lax body: about half of a group's share.

    >>> lax_tile(4096, 8), lax_tile(100, 8), lax_tile(0, 4)
    (256, 16, 1)
    """
    tile = 16
    while tile < 256 and tile * 2 * groups <= rows:
        tile *= 2
    return max(1, min(tile, rows))


class Tiles(NamedTuple):
    """The sizes of the TPU body's tiles: rows, contracted columns, columns of the result."""

    m: int
    k: int
    n: int


def tpu_tiles(rows: int, groups: int, inner: int, outer: int) -> Tiles | None:
    """Return the tiles of the TPU body, or ``None`` where none fits.

    >>> tpu_tiles(8192, 8, 1024, 2816)
    Tiles(m=512, k=512, n=256)
    """
    sizes = (512, 256, 128)
    k = next((size for size in sizes if inner % size == 0), None)
    n = next((size for size in sizes if outer % size == 0), None)
    if k is None or n is None:
        return None
    m = next((size for size in sizes if size * groups <= rows), 128)
    return Tiles(min(m, rows), k, n)


CUDA_ROWS = 128
"""Rows of a tile of the body for Hopper: two warpgroups' products, of 64 rows each."""

CUDA_STEP = 64
"""Contracted columns, or rows, of a step there."""


def cuda_columns(outer: int) -> int:
    """Return the columns of a tile there; estimates that fit registers and memory, unmeasured.

    >>> cuda_columns(2816), cuda_columns(384)
    (256, 128)
    """
    return 256 if outer % 256 == 0 else 128
