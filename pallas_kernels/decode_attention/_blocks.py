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
