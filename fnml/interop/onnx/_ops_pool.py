"""Pooling."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from fnml.core import ShapeError
from fnml.interop.onnx._dtypes import canonical, is_float
from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._static import checked, traced, where_is
from fnml.interop.onnx._windows import Windows, kernel_shape, windows

# The places of a kernel that are looked at one by one where their indices are wanted.
_MOST_TAPS = 4096


def _lowest(dtype: Any) -> np.ndarray:
    return np.array(-np.inf if is_float(dtype) else jnp.iinfo(dtype).min, dtype)


def _slide(x: Any, start: np.ndarray, combine: Any, slid: Windows) -> Any:
    return lax.reduce_window(
        x,
        start,
        combine,
        (1, 1, *slid.kernel),
        (1, 1, *slid.strides),
        ((0, 0), (0, 0), *slid.pads),
        window_dilation=(1, 1, *slid.dilations),
    )


def _taps(x: Any, fill: np.ndarray, slid: Windows) -> list[Any]:
    """Return for each place of the kernel what the windows have there."""
    edges = [(0, 0, 0), (0, 0, 0), *((low, high, 0) for low, high in slid.pads)]
    padded = lax.pad(x, jnp.asarray(fill), edges)
    found = []
    for tap in np.ndindex(*slid.kernel):
        low = [t * d for t, d in zip(tap, slid.dilations, strict=True)]
        high = [
            a + (count - 1) * s + 1
            for a, s, count in zip(low, slid.strides, slid.counts, strict=True)
        ]
        found.append(
            lax.slice(padded, (0, 0, *low), (*padded.shape[:2], *high), (1, 1, *slid.strides))
        )
    return found


def _max_pool(node: Node, x: Any) -> Any:
    (x,) = traced(node, x)
    slid = windows(node, x.shape[2:], kernel_shape(node))
    wanted = len(node.outputs) > 1 and node.outputs[1]
    if not wanted and all(d == 1 for d in slid.dilations):
        return _slide(x, _lowest(x.dtype), lax.max, slid)
    if not wanted:
        return _largest(x, slid)
    checked(node, (math.prod(slid.kernel), *x.shape[:2], *slid.counts))
    if math.prod(slid.kernel) > _MOST_TAPS:
        raise ShapeError(f"{where_is(node)}: indices of a kernel of {slid.kernel}")
    taps = jnp.stack(_taps(x, _lowest(x.dtype), slid))
    return taps.max(0), _places(node, x, slid, jnp.argmax(taps, 0))


def _largest(x: Any, slid: Windows) -> Any:
    """Take the largest of spread windows axis by axis: ``lax`` cannot differentiate these."""
    for axis, (kernel, stride, dilation, (low, high), count) in enumerate(
        zip(slid.kernel, slid.strides, slid.dilations, slid.pads, slid.counts, strict=True), 2
    ):
        edges = [(0, 0, 0)] * x.ndim
        edges[axis] = (low, high, 0)
        padded = lax.pad(x, jnp.asarray(_lowest(x.dtype)), edges)
        starts = [tap * dilation for tap in range(kernel)]
        x = functools.reduce(
            jnp.maximum,
            [
                lax.slice_in_dim(padded, start, start + (count - 1) * stride + 1, stride, axis)
                for start in starts
            ],
        )
    return x


def _places(node: Node, x: Any, slid: Windows, tap: Any) -> Any:
    """Return the index into all of ``x`` of the element that each window chose."""
    row_major = not node.attributes.get("storage_order", 0)
    dtype = canonical(np.int64)
    offsets = np.indices(slid.kernel).reshape(len(slid.kernel), -1)
    space = x.shape[2:]
    strides = [1] * len(space)
    order = range(len(space))
    previous = 1
    for axis in reversed(order) if row_major else order:
        strides[axis], previous = previous, previous * space[axis]
    index = jnp.zeros(tap.shape, dtype)
    for axis, count in enumerate(slid.counts):
        start = np.arange(count) * slid.strides[axis] - slid.pads[axis][0]
        start = start.reshape((-1,) + (1,) * (len(slid.counts) - 1 - axis)).astype(dtype)
        chosen = jnp.asarray((offsets[axis] * slid.dilations[axis]).astype(dtype))[tap]
        base = start.reshape((1,) * (chosen.ndim - start.ndim) + start.shape)
        index = index + (chosen + base) * strides[axis]
    images = np.arange(math.prod(x.shape[:2]), dtype=dtype) * math.prod(space)
    return index + images.reshape(*x.shape[:2], *(1,) * len(space))


def _average_pool(node: Node, x: Any) -> Any:
    (x,) = traced(node, x)
    slid = windows(node, x.shape[2:], kernel_shape(node))
    padded = bool(node.attributes.get("count_include_pad", 0))
    count = np.ones((1, 1), np.float64)
    for axis, size in enumerate(x.shape[2:]):
        low, high = slid.given[axis] if padded else (0, 0)
        starts = np.arange(slid.counts[axis]) * slid.strides[axis] - slid.pads[axis][0]
        places = starts[:, None] + np.arange(slid.kernel[axis]) * slid.dilations[axis]
        inside = ((places >= -low) & (places < size + high)).sum(1)
        count = count[..., None] * inside
    total = _slide(x, np.zeros((), x.dtype), lax.add, slid)
    return total / jnp.asarray(np.maximum(count, 1), x.dtype)


def _lp_pool(node: Node, x: Any) -> Any:
    (x,) = traced(node, x)
    p = node.attributes.get("p", 2)
    slid = windows(node, x.shape[2:], kernel_shape(node))
    return _slide(jnp.abs(x) ** p, np.zeros((), x.dtype), lax.add, slid) ** (1 / p)


def _global_average(node: Node, x: Any) -> Any:
    (x,) = traced(node, x)
    return x.mean(tuple(range(2, x.ndim)), keepdims=True)


def _global_max(node: Node, x: Any) -> Any:
    (x,) = traced(node, x)
    return x.max(tuple(range(2, x.ndim)), keepdims=True)


def _global_lp(node: Node, x: Any) -> Any:
    (x,) = traced(node, x)
    p = node.attributes.get("p", 2)
    return (jnp.abs(x) ** p).sum(tuple(range(2, x.ndim)), keepdims=True) ** (1 / p)


OPERATORS: Mapping[str, Operator] = {
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average,
    "GlobalLpPool": _global_lp,
    "GlobalMaxPool": _global_max,
    "LpPool": _lp_pool,
    "MaxPool": _max_pool,
}
