"""What the kernel computes and moves."""

from fnml.pallas_kernels._cost import Cost


def forward_cost(rows: int, width: int, itemsize: int, residual: bool) -> Cost:
    """Count the forward pass: two sums, a square and four more an element, one root a row."""
    elements = rows * width
    arrays = 4 if residual else 2
    return Cost((7 + residual) * elements, arrays * elements * itemsize + 8 * width, rows)


def backward_cost(rows: int, width: int, itemsize: int, residual: bool) -> Cost:
    """Count the backward pass: it reads the sum and the gradients, and writes one gradient."""
    elements = rows * width
    arrays = 4 if residual else 3
    return Cost((16 + residual) * elements, arrays * elements * itemsize + 12 * width, rows)
