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


class CudaTiles(NamedTuple):
    """How the GPU body cuts the codes.

    Attributes:
      n: columns of a block of threads, and the width of its tiles of 512 codes.
      at_once: tiles that a warpgroup loads at once.
    """

    n: int
    at_once: int

    @property
    def rows(self) -> int:
        """The height of a tile: each of 128 threads holds four codes."""
        return 512 // self.n

    @property
    def batch(self) -> int:
        """The rows that a warpgroup loads at once."""
        return self.at_once * self.rows


CUDA_M = 8
"""The most rows of x that the GPU body takes: it adds up each of them in registers of its own."""

CUDA_WARPGROUPS = 4
"""Warpgroups of a block of threads; they take turns with batches of rows, and add up at the end."""

_CUDA_CORES = 132
"""Streaming multiprocessors of an H100 or H200."""


def cuda_tiles(layout: Layout, M: int, outputs: int) -> CudaTiles | None:
    """Return the tiles of the GPU body, or ``None`` where none fits.

    The width is the one that leaves the fewest cores without a block of columns, the wider one of
    equals. As many tiles are loaded at once as hide the memory's latency and leave registers for
    the sums of M rows (test_compiled). Both are estimates.

    >>> cuda_tiles(Layout(8, 4096, 128), 1, 4096), cuda_tiles(Layout(4, 4096, 128), 8, 8192)
    (CudaTiles(n=32, at_once=16), CudaTiles(n=64, at_once=4))
    """
    counts = {1: (16, 8, 4), 2: (8, 4)}.get(M, (4,))
    inside = layout.part % layout.group == 0 or layout.group == layout.rows
    if layout.parts == 2 and not inside:
        return None

    def busy(n: int) -> float:
        blocks = outputs // n
        return blocks / (_CUDA_CORES * -(-blocks // _CUDA_CORES))

    def fits(tiles: CudaTiles) -> bool:
        batch, group = tiles.batch, layout.group
        whole = group % batch == 0 or (batch % group == 0 and group % tiles.rows == 0)
        return layout.part % batch == 0 and whole

    found = {}
    for n in (128, 64, 32):
        fitting = [t for t in (CudaTiles(n, count) for count in counts) if fits(t)]
        if outputs % n == 0 and fitting:
            found[n] = fitting[0]
    return found[max(found, key=busy)] if found else None
