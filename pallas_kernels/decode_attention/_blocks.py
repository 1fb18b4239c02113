"""How many tokens of a cache are read at a time."""

LAX_BLOCK = 256
"""Tokens in a block of the lax body."""

MOST_COLUMNS = 4096
"""The most keys, counted over heads, in one block of the TPU body."""

MOST_ROWS = 256
"""The most queries, counted over tokens and heads, that the TPU body takes at once."""

VMEM_LIMIT = 32 * 2**20
"""Bytes of a core's memory that the TPU body may use: four [rows, columns] arrays of float32 at
their largest, and the blocks of keys and values, twice each."""


def tpu_block(length: int, heads: int, width: int, itemsize: int) -> int:
    """Return the tokens of a block of the TPU body: all of them, or a power of two.

    >>> tpu_block(8192, 8, 128, 2), tpu_block(100, 8, 128, 2)
    (512, 100)
    """
    block = 512
    while block > 16 and (block * heads > MOST_COLUMNS or block * heads * width * itemsize > 2**20):
        block //= 2
    return min(length, block)


CUDA_WIDTHS = (64, 128)
"""Head widths that the body for Hopper takes."""

CUDA_ROWS = 64
"""The most queries of one head of keys that it takes: the height of a matrix product."""

CUDA_TILE = 64
"""The tokens of a tile there, which two warpgroups take turns at."""

CUDA_BYTES = 128 * 2**10
"""The most bytes of keys and values that a block of threads holds at once; with the queries, the
results and the codes as floats that is close to all shared memory (test_compiled)."""

CUDA_THREADS = 132
"""Blocks of threads to have at least, by cutting sequences into parts: one for each multiprocessor
of an H200. An estimate, unmeasured."""


def cuda_slots(width: int, itemsize: int) -> int:
    """Return how many tiles of keys, and of values, shared memory holds: an even number.

    >>> cuda_slots(128, 2), cuda_slots(128, 1), cuda_slots(64, 1)
    (4, 6, 6)
    """
    return min(6, CUDA_BYTES // (4 * CUDA_TILE * width * itemsize) * 2)


def cuda_parts(sequences: int, tiles: int) -> int:
    """Return into how many parts to cut each sequence, of eight tiles and more.

    >>> cuda_parts(64, 128), cuda_parts(1, 128), cuda_parts(512, 128)
    (3, 16, 1)
    """
    return max(1, min(-(-CUDA_THREADS // sequences), tiles // 8))
