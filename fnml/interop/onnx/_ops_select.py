"""Selecting elements: by rank, by condition, by index, by position."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from fnml.interop.onnx._dtypes import canonical, is_float
from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._static import axis_of, checked, namespace, static, static_ints, traced

_INDEX = np.dtype(np.int64)


def _arg(pick: Callable[..., Any]) -> Operator:
    """Make ArgMax or ArgMin of ``jnp.argmax`` or ``jnp.argmin``."""

    def operator(node: Node, x: Any) -> Any:
        (x,) = traced(node, x)
        axis = axis_of(node, node.attributes.get("axis", 0), x.ndim)
        keep = bool(node.attributes.get("keepdims", 1))
        if node.attributes.get("select_last_index", 0):
            index = x.shape[axis] - 1 - pick(jnp.flip(x, axis), axis=axis, keepdims=keep)
        else:
            index = pick(x, axis=axis, keepdims=keep)
        return index.astype(canonical(_INDEX))

    return operator


def _compress(node: Node, x: Any, condition: Any) -> Any:
    (kept,) = np.nonzero(static(node, 1, condition))
    axis = node.attributes.get("axis")
    if axis is None:
        return x.reshape(-1)[kept]
    return namespace(x).take(x, kept, axis=axis_of(node, axis, x.ndim))


def _gather_elements(node: Node, x: Any, indices: Any) -> Any:
    xp = namespace(x, indices)
    axis = axis_of(node, node.attributes.get("axis", 0), x.ndim)
    # Along the other axes, indices may stop before the data does.
    window = [slice(n if a != axis else None) for a, n in enumerate(indices.shape)]
    return xp.take_along_axis(xp.asarray(x)[tuple(window)], xp.asarray(indices), axis=axis)


def _gather_nd(node: Node, x: Any, indices: Any) -> Any:
    xp = namespace(x, indices)
    batch = node.attributes.get("batch_dims", 0)
    rank = indices.ndim - 1
    rows = tuple(
        np.arange(x.shape[d]).reshape([-1 if a == d else 1 for a in range(rank)])
        for d in range(batch)
    )
    columns = tuple(xp.moveaxis(xp.asarray(indices), -1, 0))
    return xp.asarray(x)[rows + columns]


def _hardmax(node: Node, x: Any) -> Any:
    (x,) = traced(node, x)
    whole = node.version < 13
    axis = axis_of(node, node.attributes.get("axis", 1 if whole else -1), x.ndim)
    # Before opset 13 all axes from `axis` on are one.
    rows = x.reshape(int(np.prod(x.shape[:axis])), -1) if whole else x
    axis = 1 if whole else axis
    best = jnp.argmax(rows, axis=axis, keepdims=True)
    place = lax.broadcasted_iota(best.dtype, rows.shape, axis)
    return (place == best).astype(x.dtype).reshape(x.shape)


def _non_zero(node: Node, x: Any) -> np.ndarray:
    x = static(node, 0, x)
    return np.stack(np.nonzero(np.atleast_1d(x))).astype(_INDEX)[: max(x.ndim, 1)]


def _one_hot(node: Node, indices: Any, depth: Any, values: Any) -> Any:
    (size,) = (int(d) for d in np.ravel(static(node, 1, depth)))
    checked(node, (*indices.shape, size))
    indices, values = traced(node, indices, values)
    axis = axis_of(node, node.attributes.get("axis", -1), indices.ndim + 1)
    places = indices.astype(canonical(_INDEX))
    places = jnp.expand_dims(jnp.where(places < 0, places + size, places), axis)
    shape = (*indices.shape[:axis], size, *indices.shape[axis:])
    hit = lax.broadcasted_iota(places.dtype, shape, axis) == places
    return jnp.where(hit, values[1], values[0])


def _reverse_sequence(node: Node, x: Any, lengths: Any) -> Any:
    x, lengths = traced(node, x, lengths)
    time, batch = node.attributes.get("time_axis", 0), node.attributes.get("batch_axis", 1)
    time, batch = axis_of(node, time, x.ndim), axis_of(node, batch, x.ndim)
    places = lax.broadcasted_iota(
        lengths.dtype, [1] * time + [x.shape[time]] + [1] * (x.ndim - time - 1), time
    )
    ends = lengths.reshape([-1 if a == batch else 1 for a in range(x.ndim)])
    source = jnp.where(places < ends, ends - 1 - places, places)
    return jnp.take_along_axis(x, source, axis=time)


def _top_k(node: Node, x: Any, k: Any = None) -> tuple[Any, Any]:
    (x,) = traced(node, x)
    (count,) = static_ints(node, 1, k) if node.version >= 10 else (node.attributes["k"],)
    axis = axis_of(node, node.attributes.get("axis", -1), x.ndim)
    last = jnp.moveaxis(x, axis, -1)
    largest = bool(node.attributes.get("largest", 1))
    # The complement turns the order of integers around, and no value overflows.
    order = last if largest else -last if is_float(x.dtype) else ~last
    _, indices = lax.top_k(order, count)
    values = jnp.take_along_axis(last, indices, axis=-1)
    indices = indices.astype(canonical(_INDEX))
    return jnp.moveaxis(values, -1, axis), jnp.moveaxis(indices, -1, axis)


def _unique(node: Node, x: Any) -> tuple[np.ndarray, ...]:
    x = static(node, 0, x)
    axis = node.attributes.get("axis")
    values, first, inverse, counts = np.unique(
        x, return_index=True, return_inverse=True, return_counts=True, axis=axis
    )
    inverse = inverse.ravel()
    if not node.attributes.get("sorted", 1):
        order = np.argsort(first)
        rank = np.argsort(order)
        values = np.take(values, order, axis=0 if axis is None else axis)
        first, counts, inverse = first[order], counts[order], rank[inverse]
    return values, first.astype(_INDEX), inverse.astype(_INDEX), counts.astype(_INDEX)


OPERATORS: Mapping[str, Operator] = {
    "ArgMax": _arg(jnp.argmax),
    "ArgMin": _arg(jnp.argmin),
    "Compress": _compress,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Hardmax": _hardmax,
    "NonZero": _non_zero,
    "OneHot": _one_hot,
    "ReverseSequence": _reverse_sequence,
    "TopK": _top_k,
    "Unique": _unique,
}

SHAPE_INPUTS: Mapping[str, tuple[int, ...]] = {
    "Compress": (1,),
    "NonZero": (0,),
    "OneHot": (1,),
    "TopK": (1,),
    "Unique": (0,),
}
