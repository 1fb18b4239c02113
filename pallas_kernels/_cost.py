"""What a kernel tells the compiler about itself."""

from typing import NamedTuple


class Cost(NamedTuple):
    """Operations and bytes of memory traffic of one call."""

    flops: int
    bytes_accessed: int
    transcendentals: int
