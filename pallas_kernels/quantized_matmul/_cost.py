"""What the kernel computes and moves."""

from fnml.pallas_kernels._cost import Cost


def cost(M: int, rows: int, outputs: int, bits: int, groups: int, itemsize: int) -> Cost:
    """Count one product of [M, rows] by [rows, outputs], forward or backward."""
    weight = rows * outputs * bits // 8 + 4 * groups * outputs
    return Cost(2 * M * rows * outputs, weight + M * (rows + outputs) * itemsize, 0)
