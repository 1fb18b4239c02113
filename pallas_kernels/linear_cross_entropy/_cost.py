"""What the kernels compute and move."""

from fnml.pallas_kernels._cost import Cost


def cost(products: int, N: int, D: int, V: int, itemsize: int, tokens: int) -> Cost:
    """Count one kernel of ``products`` matrix products over all logits.

    The classes' weights are read once per tile of ``tokens`` tokens.
    """
    moved = (N * D + -(-N // tokens) * D * V) * itemsize
    return Cost(2 * products * N * D * V, moved, N * V)
