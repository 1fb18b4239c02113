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
"""Up to this width "auto" uses the kernel on TPUs, if there are more classes than 4,096.

It computes the logits three times where the lax body writes them to memory and reads them again:
by a v5e's ratio of arithmetic to bandwidth, 240 operations per byte, the products cost less up to
a width of about 1,300. An estimate: it was not measured.
"""
