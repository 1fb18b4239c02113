"""How the matrix is cut."""

from typing import NamedTuple

from fnml.pallas_kernels.quantized_matmul._packed import Layout

_LAX_BYTES = 2**21
"""Float32 bytes of a block of the lax body, about what a CPU core keeps close."""


def lax_rows(layout: Layout, outputs: int) -> int:
    """Return the rows of codes in a block: a divisor that groups fit into, or all rows.

    >>> lax_rows(Layout(8, 2048, 128), 4096), lax_rows(Layout(8, 100, 100), 10)
    (128, 100)
    """
    most = max(1, _LAX_BYTES // (4 * outputs))
    if layout.part <= most:
        return layout.part
    fitting = [
        rows
        for rows in range(1, most + 1)
        if layout.part % rows == 0 and (rows % layout.group == 0 or layout.group % rows == 0)
    ]
    # Many tiny blocks would cost more than the memory they save.
    return fitting[-1] if fitting[-1] >= min(16, most) else layout.part


class Tiles(NamedTuple):
    """The sizes of the TPU body's tiles: rows of x, rows of codes, columns of codes."""

    m: int
    k: int
    n: int


def tpu_tiles(layout: Layout, M: int, outputs: int) -> Tiles | None:
    """Return the tiles of the TPU body, or ``None`` where none fits.

    >>> tpu_tiles(Layout(8, 4096, 128), 1, 4096)
    Tiles(m=1, k=512, n=512)
    """
    sizes = (512, 256, 128)
    n = next((size for size in sizes if outputs % size == 0), None)
    inside = layout.part % layout.group == 0 or layout.group == layout.rows
    k = next(
        (
            size
            for size in sizes
            if layout.part % size == 0
            and (layout.group % size == 0 or (size % layout.group == 0 and layout.group % 8 == 0))
        ),
        None,
    )
    if n is None or k is None or not (inside or layout.parts == 1):
        return None
    return Tiles(min(M, 256), k, n)
