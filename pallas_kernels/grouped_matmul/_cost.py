"""What the kernel computes and moves."""

from fnml.pallas_kernels._cost import Cost


def cost(N: int, E: int, D: int, F: int, itemsize: int, weight_itemsize: int) -> Cost:
    """Count one product a row; every matrix is read, or written, once."""
    return Cost(2 * N * D * F, N * (D + F) * itemsize + E * D * F * weight_itemsize, 0)
