"""What the kernel computes and moves."""

from fnml.pallas_kernels._cost import Cost


def cost(
    B: int, t: int, H: int, K: int, D: int, S: int, itemsize: int, cache_itemsize: int
) -> Cost:
    """Count two products for each pair of query and key, and one reading of a full cache."""
    pairs = B * t * H * S
    scales = 8 * B * K * S if cache_itemsize == 1 else 0
    cache = 2 * B * S * K * D * cache_itemsize + scales
    return Cost(4 * pairs * D, cache + 2 * B * t * H * D * itemsize, pairs)
