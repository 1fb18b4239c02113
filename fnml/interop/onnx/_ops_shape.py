"""Operators that rearrange, cut, join and make arrays."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from fnml.core import ShapeError
from fnml.interop.onnx._dtypes import widest
from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._static import (
    axis_of,
    checked,
    is_static,
    is_symbolic,
    namespace,
    size_array,
    static,
    static_ints,
    traced,
    where_is,
)

# Files cut "to the end" at numbers of this size and more.
_FAR = 10**9


def _from_attribute_or_input(
    node: Node, name: str, since: int, place: int, value: Any
) -> tuple[int, ...] | None:
    if node.version < since:
        given = node.attributes.get(name)
        return None if given is None else tuple(given)
    return None if value is None else static_ints(node, place, value)


def _reshape(node: Node, x: Any, shape: Any = None) -> Any:
    wanted = list(_from_attribute_or_input(node, "shape", 5, 1, shape) or ())
    if not node.attributes.get("allowzero", 0):
        wanted = [x.shape[i] if size == 0 and i < x.ndim else size for i, size in enumerate(wanted)]
    if wanted.count(-1) == 1:
        rest = math.prod(size for size in wanted if size != -1)
        wanted[wanted.index(-1)] = x.size // rest if rest else 0
    return x.reshape(checked(node, wanted))


def _flatten(node: Node, x: Any) -> Any:
    axis = node.attributes.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _transpose(node: Node, x: Any) -> Any:
    order = node.attributes.get("perm", range(x.ndim)[::-1])
    return namespace(x).transpose(x, tuple(order))


def _squeeze(node: Node, x: Any, axes: Any = None) -> Any:
    given = _from_attribute_or_input(node, "axes", 13, 1, axes)
    if given is None:
        given = tuple(i for i, size in enumerate(x.shape) if size == 1)
    return namespace(x).squeeze(x, axis=tuple(axis_of(node, a, x.ndim) for a in given))


def _unsqueeze(node: Node, x: Any, axes: Any = None) -> Any:
    given = _from_attribute_or_input(node, "axes", 13, 1, axes) or ()
    rank = x.ndim + len(given)
    places = tuple(sorted(axis_of(node, a, rank) for a in given))
    if is_static(x):
        return np.expand_dims(x, places)
    return lax.expand_dims(x, places)


def _expand(node: Node, x: Any, shape: Any) -> Any:
    wanted = checked(node, jnp.broadcast_shapes(x.shape, static_ints(node, 1, shape)))
    return _broadcast(x, wanted)


def _broadcast(x: Any, shape: tuple[Any, ...]) -> Any:
    symbolic = not all(isinstance(size, int) for size in shape)
    return (jnp if symbolic else namespace(x)).broadcast_to(x, shape)


def _tile(node: Node, x: Any, repeats: Any, axis: Any = None) -> Any:
    times = static_ints(node, 1, repeats)
    if node.version < 6:
        (place,) = static_ints(node, 2, axis)
        times = tuple(times[0] if i == place else 1 for i in range(x.ndim))
    checked(node, [a * b for a, b in zip(x.shape, times, strict=True)])
    return namespace(x).tile(x, times)


def _concat(node: Node, *values: Any) -> Any:
    axis = node.attributes.get("axis", 1)
    if is_static(*values):
        return np.concatenate(values, axis_of(node, axis, values[0].ndim))
    values = traced(node, *values)
    dtype = widest(*(v.dtype for v in values))
    return lax.concatenate([v.astype(dtype) for v in values], axis_of(node, axis, values[0].ndim))


def _split(node: Node, x: Any, split: Any = None) -> Any:
    axis = axis_of(node, node.attributes.get("axis", 0), x.ndim)
    sizes = _from_attribute_or_input(node, "split", 13, 1, split)
    if sizes is None:
        count = node.attributes.get("num_outputs", len(node.outputs))
        size = -(-x.shape[axis] // count)
        sizes = (*[size] * (count - 1), x.shape[axis] - size * (count - 1))
    if sum(sizes) != x.shape[axis] or min(sizes, default=0) < 0:
        raise ShapeError(f"{where_is(node)}: splits {x.shape[axis]} into {list(sizes)}")
    if is_static(x):
        return tuple(np.split(x, np.cumsum(sizes)[:-1], axis))
    return tuple(lax.split(x, sizes, axis))


def _slice(
    node: Node, x: Any, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None
) -> Any:
    begin = _from_attribute_or_input(node, "starts", 10, 1, starts) or ()
    end = _from_attribute_or_input(node, "ends", 10, 2, ends) or ()
    chosen = _from_attribute_or_input(node, "axes", 10, 3, axes) or range(len(begin))
    stride = (1,) * len(begin) if steps is None else static_ints(node, 4, steps)
    cuts = [slice(None)] * x.ndim
    for low, high, axis, step in zip(begin, end, chosen, stride, strict=True):
        place = axis_of(node, axis, x.ndim)
        cuts[place] = _cut(low, high, step, x.shape[place])
    if is_static(x) or not all(isinstance(size, int) for size in x.shape):
        return x[tuple(cuts)]
    turned = [i for i, cut in enumerate(cuts) if cut.step is not None and cut.step < 0]
    ranges = [range(*cut.indices(size)) for cut, size in zip(cuts, x.shape, strict=True)]
    ranges = [r[::-1] if i in turned else r for i, r in enumerate(ranges)]
    x = lax.slice(
        x,
        [r.start if len(r) else 0 for r in ranges],
        [r[-1] + 1 if len(r) else 0 for r in ranges],
        [r.step for r in ranges],
    )
    return lax.rev(x, turned) if turned else x


def _cut(low: int, high: int, step: int, size: int) -> slice:
    if not isinstance(size, int) and step > 0:
        return slice(_symbolic_end(low, size), _symbolic_end(high, size), step)
    low = low + size if low < 0 else low
    high = high + size if high < 0 else high
    if step > 0:
        return slice(min(max(low, 0), size), min(max(high, 0), size), step)
    low, high = min(max(low, 0), size - 1), min(max(high, -1), size - 1)
    return slice(low, None if high < 0 else high, step)


def _symbolic_end(end: Any, size: Any) -> Any:
    """Return where a cut of an axis of symbolic size begins or ends; the axis is long enough."""
    if not isinstance(end, int):
        return end
    return size if end >= _FAR else size + end if end < 0 else end


def _shape(node: Node, x: Any) -> Any:
    return size_array(x.shape[node.attributes.get("start", 0) : node.attributes.get("end")])


def _size(node: Node, x: Any) -> Any:
    return size_array(math.prod(x.shape))


def _identity(node: Node, x: Any) -> Any:
    return x


_MODES = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}


def _pad(node: Node, x: Any, pads: Any = None, value: Any = None, axes: Any = None) -> Any:
    name = "pads" if node.version > 1 else "paddings"
    amounts = _from_attribute_or_input(node, name, 11, 1, pads) or ()
    if node.version < 11:
        value = np.asarray(node.attributes.get("value", 0.0), x.dtype)
    places = range(x.ndim) if axes is None else static_ints(node, 3, axes)
    half = len(amounts) // 2
    edges = [(0, 0)] * x.ndim
    for axis, low, high in zip(places, amounts[:half], amounts[half:], strict=True):
        edges[axis_of(node, axis, x.ndim)] = (low, high)
    checked(
        node, [size + max(a, 0) + max(b, 0) for size, (a, b) in zip(x.shape, edges, strict=True)]
    )
    mode = node.attributes.get("mode", "constant")
    if mode == "constant":
        (x,) = traced(node, x)
        fill = jnp.zeros((), x.dtype) if value is None else traced(node, value)[0]
        return lax.pad(x, fill.reshape(()).astype(x.dtype), [(a, b, 0) for a, b in edges])
    inner = tuple(
        slice(max(-a, 0), size - max(-b, 0)) for size, (a, b) in zip(x.shape, edges, strict=True)
    )
    widths = [(max(a, 0), max(b, 0)) for a, b in edges]
    return namespace(x).pad(x[inner], widths, mode=_MODES[mode])


def _constant_of_shape(node: Node, shape: Any) -> Any:
    value = node.attributes.get("value", np.zeros(1, np.float32))
    return _broadcast(value.reshape(()), checked(node, static_ints(node, 0, shape)))


def _range(node: Node, start: Any, limit: Any, delta: Any) -> Any:
    low, high, step = (static(node, i, v).item() for i, v in enumerate((start, limit, delta)))
    if any(map(is_symbolic, (start, limit, delta))):
        return jnp.arange(low, high, step)
    count = max(math.ceil((high - low) / step), 0)
    checked(node, (count,))
    return (low + step * np.arange(count)).astype(start.dtype)


def _gather(node: Node, x: Any, indices: Any) -> Any:
    axis = axis_of(node, node.attributes.get("axis", 0), x.ndim)
    if is_static(x, indices):
        return np.take(x, indices, axis)
    if isinstance(indices, np.ndarray) and indices.ndim == 0:
        return lax.index_in_dim(x, int(indices), axis, keepdims=False)
    x, indices = traced(node, x, indices)
    return jnp.take(x, indices, axis)


OPERATORS: Mapping[str, Operator] = {
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Identity": _identity,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
SHAPE_INPUTS = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1, 2),
    "Unsqueeze": (1,),
}
