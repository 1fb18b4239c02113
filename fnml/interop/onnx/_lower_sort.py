"""Write sorts as TopK, which is stable: among equals the first comes first."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fnml.interop.onnx._builder import Builder, Lowering
from fnml.interop.onnx._lower_shape import shape_of

_INT64 = np.dtype(np.int64)


def _signed(g: Builder, key: str) -> str:
    """Return a key of the same order that is no unsigned 32 or 64 bit, which TopK has not.

    A wider type would do for ONNX, but JAX without 64 bit would read it as a narrow one.
    """
    own = g.dtypes[key]
    if own.kind != "u" or own.itemsize < 4:
        return key
    turned = g("BitwiseXor", key, np.array(1 << (8 * own.itemsize - 1), own))
    return g.cast(turned, np.dtype(f"int{8 * own.itemsize}"))


def _ascending(g: Builder, key: str, axis: int, size: str) -> tuple[str, str]:
    """Return a sorted array, and where each element came from."""
    return g(
        "TopK", key, size, count=2, dtype=(g.dtypes[key], _INT64), axis=axis, largest=0, sorted=1
    )


def _sort(g: Builder, eqn: Any, *operands: str) -> list[str]:
    axis, keys = int(eqn.params["dimension"]), int(eqn.params["num_keys"])
    size = g.vector([shape_of(eqn.invars[0])[axis]])
    if len(operands) == 1 and _signed(g, operands[0]) == operands[0]:
        return [_ascending(g, operands[0], axis, size)[0]]
    order: str | None = None
    # By the last key first: each later pass keeps the order of equals.
    for key in [_signed(g, key) for key in operands[:keys]][::-1]:
        moved = key if order is None else g("GatherElements", key, order, axis=axis)
        _, places = _ascending(g, moved, axis, size)
        order = places if order is None else g("GatherElements", order, places, axis=axis)
    return [g("GatherElements", x, order, axis=axis) for x in operands]


def _top_k(g: Builder, eqn: Any, x: str) -> list[str]:
    rank = len(shape_of(eqn.invars[0]))
    axis = int(eqn.params.get("axis", rank - 1))
    key = _signed(g, x)
    values, places = g(
        "TopK",
        key,
        g.vector([eqn.params["k"]]),
        count=2,
        dtype=(g.dtypes[key], _INT64),
        axis=axis,
        largest=1,
        sorted=1,
    )
    if key != x:
        values = g("GatherElements", x, places, axis=axis)
    return [values, g.cast(places, np.dtype(eqn.outvars[1].aval.dtype))]


LOWERINGS: Mapping[str, Lowering] = {"sort": _sort, "top_k": _top_k}
