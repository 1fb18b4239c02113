"""Sizes of chunks and tiles, as data."""


def lax_chunk(N: int, V: int) -> int:
    """Return how many tokens' logits to hold at once: about 32 MiB of float32, 64 to 2,048 tokens.

    Measured on a two-core CPU at V = 32,768: 256 tokens are as fast as any larger number.
    """
    return min(max(64, min(2048, 2**23 // V)), -(-N // 8) * 8)


TPU = {512: (512, 512), 1024: (256, 256), 2048: (256, 128)}
"""Tokens and classes per tile, by the widest x that a row is for: they fit 16 MiB (test_compiled)."""

TPU_WIDEST = 2048

WORTH = 1024
"""Up to this width "auto" uses a kernel, from 4,096 classes on.

That for TPUs computes the logits three times where the lax body writes them to memory and reads
them again: by a v5e's ratio of arithmetic to bandwidth, 240 operations per byte, the products cost
less up to a width of about 1,300. That for Hopper computes them twice and writes their slopes; an
H200's ratio, 206, is close. An estimate: it was not measured.
"""

CUDA_TOKENS = 128
"""Tokens of a tile of the kernels for Hopper: two warpgroups' products, of 64 rows each."""

CUDA_CLASSES = 128
"""Classes of a tile there; registers hold them without a spill (test_compiled)."""

CUDA_STEP = 64
"""Columns of x that are multiplied at a time there."""


def cuda_parts(tiles: int, columns: int) -> int:
    """Return into how many parts to cut the classes, so that an H200's 132 multiprocessors work.

    ``tiles`` and ``columns`` count the tiles of tokens and of classes. An estimate, unmeasured.

    >>> cuda_parts(32, 256), cuda_parts(256, 256), cuda_parts(1, 4)
    (4, 1, 4)
    """
    return max(1, min(132 // tiles, columns))


def cuda_chunk(N: int, V: int) -> int:
    """Return how many tokens' slopes to hold at once there: at most about 128 MiB of 2 bytes each.

    Every chunk adds to the gradient of w in memory once, so that small ones cost bandwidth.

    >>> cuda_chunk(8192, 32768), cuda_chunk(2100, 32768), cuda_chunk(300, 32768)
    (2048, 1152, 384)
    """
    chunks = -(-N // max(CUDA_TOKENS, 2**26 // V))
    return -(-N // (chunks * CUDA_TOKENS)) * CUDA_TOKENS
