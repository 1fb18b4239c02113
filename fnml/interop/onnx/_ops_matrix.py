"""Matrices and running sums: Einsum, Det, Trilu, EyeLike, CumSum, CumProd; IsInf and IsNaN."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from fnml.interop.onnx._dtypes import DTYPES
from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._static import axis_of, static_ints, traced


def _einsum(node: Node, *operands: Any) -> Any:
    return jnp.einsum(node.attributes["equation"].replace(" ", ""), *traced(node, *operands))


def _det(node: Node, x: Any) -> Any:
    (x,) = traced(node, x)
    return jnp.linalg.det(x)


def _trilu(node: Node, x: Any, k: Any = None) -> Any:
    x, k = traced(node, x, k)
    offset = 0 if k is None else k.reshape((1, 1))
    rows = lax.broadcasted_iota(jnp.int32 if k is None else k.dtype, x.shape[-2:], 0)
    columns = lax.broadcasted_iota(rows.dtype, x.shape[-2:], 1)
    upper = bool(node.attributes.get("upper", 1))
    kept = columns - rows >= offset if upper else columns - rows <= offset
    return jnp.where(jnp.broadcast_to(kept, x.shape), x, jnp.zeros((), x.dtype))


def _eye_like(node: Node, x: Any) -> np.ndarray:
    code = node.attributes.get("dtype")
    dtype = x.dtype if code is None else DTYPES[code]
    return np.eye(x.shape[0], x.shape[1], k=node.attributes.get("k", 0), dtype=np.float32).astype(
        dtype
    )


def _running(scan: Callable[..., Any], start: int) -> Operator:
    """Make CumSum or CumProd of ``lax.cumsum`` or ``lax.cumprod`` and its neutral element."""

    def operator(node: Node, x: Any, axis: Any) -> Any:
        (place,) = static_ints(node, 1, axis)
        (x,) = traced(node, x)
        place = axis_of(node, place, x.ndim)
        reverse = bool(node.attributes.get("reverse", 0))
        if node.attributes.get("exclusive", 0):
            # Shift by one: the neutral element comes in, the far end falls out.
            edges = [(0, 0, 0)] * x.ndim
            edges[place] = (-1, 1, 0) if reverse else (1, -1, 0)
            x = lax.pad(x, jnp.asarray(start, x.dtype), edges)
        return scan(x, axis=place, reverse=reverse)

    return operator


def _is_inf(node: Node, x: Any) -> Any:
    (x,) = traced(node, x)
    wide = x if x.dtype in (jnp.float32, jnp.float64) else x.astype(jnp.float32)
    hit = jnp.zeros(x.shape, bool)
    if node.attributes.get("detect_positive", 1):
        hit |= jnp.isposinf(wide)
    if node.attributes.get("detect_negative", 1):
        hit |= jnp.isneginf(wide)
    return hit


def _is_nan(node: Node, x: Any) -> Any:
    (x,) = traced(node, x)
    return jnp.isnan(x if x.dtype in (jnp.float32, jnp.float64) else x.astype(jnp.float32))


OPERATORS: Mapping[str, Operator] = {
    "CumProd": _running(lax.cumprod, 1),
    "CumSum": _running(lax.cumsum, 0),
    "Det": _det,
    "Einsum": _einsum,
    "EyeLike": _eye_like,
    "IsInf": _is_inf,
    "IsNaN": _is_nan,
    "Trilu": _trilu,
}

SHAPE_INPUTS: Mapping[str, tuple[int, ...]] = {"CumProd": (1,), "CumSum": (1,)}
