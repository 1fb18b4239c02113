"""What the kernels compute and move."""

from fnml.pallas_kernels._cost import Cost
from fnml.pallas_kernels.attention._tiles import Plan


def pairs(plan: Plan, T: int, S: int) -> int:
    """Count the pairs of a query and a key in its reach.

    >>> pairs(Plan(1.0, right=0), 4, 4)
    10
    """
    left = T if plan.left is None else plan.left
    right = S if plan.right is None else plan.right
    return sum(max(0, min(S, t + right + 1) - max(0, t - left)) for t in range(T))


# Products of D numbers per pair: scores and values; with the slopes of weights beside them, one
# product more for queries, two more for keys and values.
_PRODUCTS = {"forward": 2, "queries": 3, "keys": 4}


def cost(part: str, plan: Plan, q: tuple[int, ...], k: tuple[int, ...], itemsize: int) -> Cost:
    """Count one kernel ("forward", "queries" or "keys") for q [B, T, H, D] and k [B, S, K, D]."""
    (B, T, H, D), (_, S, K, _) = q, k
    seen = B * H * pairs(plan, T, S)
    arrays = {"forward": (2, 2), "queries": (3, 2), "keys": (2, 4)}[part]
    moved = (arrays[0] * B * T * H + arrays[1] * B * S * K) * D * itemsize
    return Cost(2 * D * _PRODUCTS[part] * seen, moved, seen)
