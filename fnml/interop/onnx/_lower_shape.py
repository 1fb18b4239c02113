"""Write what moves and repeats whole arrays: shapes, axes, joins, iotas, padding, slices."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fnml.interop.onnx._builder import Builder, Lowering, Refused, code_of, physical
from fnml.interop.onnx._shapes import all_static, is_static

_TO_THE_END = np.iinfo(np.int64).max
_TO_THE_START = np.iinfo(np.int64).min
# Longer iotas are computed when the file runs, shorter ones lie in it.
_LONGEST_CONSTANT = 4096


def shape_of(atom: Any) -> tuple[Any, ...]:
    """Return the shape that a jaxpr's variable is kept in."""
    return physical(atom.aval)[0]


def slice_along(
    g: Builder,
    x: str,
    axes: Sequence[int],
    starts: Sequence[Any],
    stops: Sequence[Any],
    steps: Sequence[int] | None = None,
) -> str:
    """Slice ``x`` along some axes; a stop of ``None`` is the end."""
    if not axes:
        return x
    ends = [_TO_THE_END if stop is None else stop for stop in stops]
    step = None if steps is None or set(steps) == {1} else g.axes(*steps)
    return g("Slice", x, g.vector(starts), g.vector(ends), g.axes(*axes), step)


def flip(g: Builder, x: str, axes: Sequence[int]) -> str:
    """Reverse ``x`` along axes."""
    count = len(axes)
    limits = g.axes(*[-1] * count), g.axes(*[_TO_THE_START] * count)
    return g("Slice", x, *limits, g.axes(*axes), g.axes(*[-1] * count)) if axes else x


def _broadcast_in_dim(g: Builder, eqn: Any, x: str) -> str:
    old, new = shape_of(eqn.invars[0]), tuple(eqn.params["shape"])
    to = eqn.params["broadcast_dimensions"]
    if tuple(to) == tuple(range(len(new) - len(old), len(new))):
        return g.expand(x, old, new)
    placed: list[Any] = [1] * len(new)
    for dim, axis in zip(old, to, strict=True):
        placed[axis] = dim
    missing = [axis for axis in range(len(new)) if axis not in to]
    return g.expand(g.unsqueeze(x, missing, len(old)), placed, new)


def _reshape(g: Builder, eqn: Any, x: str) -> str:
    if eqn.params.get("dimensions") is not None:
        x = g.transpose(x, eqn.params["dimensions"])
    old, new = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    if new == (1,) * (len(new) - len(old)) + old:
        return g.expand(x, old, new)
    return g.reshape(x, old, new)


def _squeeze(g: Builder, eqn: Any, x: str) -> str:
    axes = eqn.params["dimensions"]
    return g("Squeeze", x, g.axes(*axes)) if axes else x


def _expand_dims(g: Builder, eqn: Any, x: str) -> str:
    return g.unsqueeze(x, eqn.params["dimensions"], len(shape_of(eqn.invars[0])))


def _transpose(g: Builder, eqn: Any, x: str) -> str:
    return g.transpose(x, eqn.params["permutation"])


def _concatenate(g: Builder, eqn: Any, *parts: str) -> str:
    return g("Concat", *parts, axis=int(eqn.params["dimension"])) if len(parts) > 1 else parts[0]


def _stack(g: Builder, eqn: Any, *parts: str) -> str:
    axis, rank = int(eqn.params["axis"]), len(shape_of(eqn.invars[0]))
    return g("Concat", *(g.unsqueeze(x, [axis], rank) for x in parts), axis=axis)


def _unstack(g: Builder, eqn: Any, x: str) -> list[str]:
    axis, count = int(eqn.params["axis"]), len(eqn.outvars)
    return [g("Gather", x, np.array(i, np.int64), axis=axis) for i in range(count)]


def _split(g: Builder, eqn: Any, x: str) -> list[str]:
    sizes, axis = eqn.params["sizes"], int(eqn.params["axis"])
    if len(sizes) == 1:
        return [x]
    # An empty part among others is refused by some runtimes.
    if any(is_static(s) and s == 0 for s in sizes):
        stops = np.cumsum([0, *sizes])
        return [slice_along(g, x, [axis], [a], [b]) for a, b in itertools.pairwise(stops)]
    return g("Split", x, g.vector(sizes), axis=axis, count=len(sizes))


def _tile(g: Builder, eqn: Any, x: str) -> str:
    return g("Tile", x, g.vector(eqn.params["reps"]))


def arange(g: Builder, size: Any, dtype: Any) -> str:
    """Return ``0, ..., size - 1`` as a vector."""
    dtype = np.dtype(dtype)
    if is_static(size) and size <= _LONGEST_CONSTANT:
        # As integers even for floating point: a float vector in a file passes for a parameter.
        counted = g.constant(np.arange(size, dtype=dtype if dtype.kind in "iu" else np.int64))
        return counted if dtype.kind in "iu" else g("Cast", counted, dtype=dtype, to=code_of(dtype))
    limit = g.size(size)
    stop = np.int64(limit) if isinstance(limit, int) else g("Squeeze", limit, g.axes(0))
    return g.cast(g("Range", np.int64(0), stop, np.int64(1)), dtype)


def _iota(g: Builder, eqn: Any, *_: str) -> str:
    shape, axis = eqn.params["shape"], int(eqn.params["dimension"])
    line = arange(g, shape[axis], eqn.params["dtype"])
    placed = [dim if i == axis else 1 for i, dim in enumerate(shape)]
    others = [i for i in range(len(shape)) if i != axis]
    return g.expand(g.unsqueeze(line, others, 1), placed, shape)


def _rev(g: Builder, eqn: Any, x: str) -> str:
    return flip(g, x, eqn.params["dimensions"])


def _slice(g: Builder, eqn: Any, x: str) -> str:
    shape = shape_of(eqn.invars[0])
    starts, stops = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or (1,) * len(shape)
    axes = [
        i
        for i, dim in enumerate(shape)
        if not (is_static(starts[i]) and starts[i] == 0 and stops[i] == dim and steps[i] == 1)
    ]
    ends = [None if stops[i] == shape[i] else stops[i] for i in axes]
    return slice_along(g, x, axes, [starts[i] for i in axes], ends, [steps[i] for i in axes])


def pad(
    g: Builder, x: str, shape: Sequence[Any], value: Any, config: Sequence[tuple[Any, Any, Any]]
) -> str:
    """Pad as ``lax.pad`` does: low, high (negative to cut) and between the elements."""
    shape = list(shape)
    for axis, (_, _, between) in enumerate(config):
        if between:
            x = _spread(g, x, shape, value, axis, int(between))
            shape[axis] = shape[axis] + (shape[axis] - 1) * between
    lows, highs = ([entry[side] for entry in config] for side in (0, 1))
    cut = [axis for axis in range(len(shape)) if _negative(lows[axis]) or _negative(highs[axis])]
    if cut:
        starts = [-lows[axis] if _negative(lows[axis]) else 0 for axis in cut]
        stops = [highs[axis] if _negative(highs[axis]) else None for axis in cut]
        x = slice_along(g, x, cut, starts, stops)
    grown = [0 if _negative(size) else size for size in (*lows, *highs)]
    if all_static(grown) and not any(grown):
        return x
    # For all axes: onnxruntime 1.32 moves a Transpose past a Pad of some axes wrongly.
    return g("Pad", x, g.vector(grown), value)


def _negative(size: Any) -> bool:
    return is_static(size) and size < 0


def _spread(g: Builder, x: str, shape: Sequence[Any], value: Any, axis: int, between: int) -> str:
    """Put ``between`` copies of a value after each element but the last."""
    apart = g("Unsqueeze", x, g.axes(axis + 1))
    grown = np.zeros(2 * len(shape) + 2, np.int64)
    grown[len(shape) + 1 + axis + 1] = between
    apart = g("Pad", apart, grown, value)
    wide = shape[axis] * (between + 1)
    split = [*shape[: axis + 1], between + 1, *shape[axis + 1 :]]
    joined = g.reshape(apart, split, [*shape[:axis], wide, *shape[axis + 1 :]])
    return slice_along(g, joined, [axis], [0], [-between])


def _pad(g: Builder, eqn: Any, x: str, value: str) -> str:
    config = eqn.params["padding_config"]
    for (low, high, between), dim in zip(config, shape_of(eqn.invars[0]), strict=True):
        if is_static(dim) and not all_static((low, high)):
            raise Refused(f"a padding of ({low}, {high}) for an axis of fixed size")
        if is_static(dim) and dim + max(dim - 1, 0) * between + min(low, 0) + min(high, 0) < 0:
            # More is cut off than there is, to be padded again.
            return g.expand(value, (), shape_of(eqn.outvars[0]))
    return pad(g, x, shape_of(eqn.invars[0]), value, config)


def _dim_as_value(g: Builder, eqn: Any, *_: str) -> str:
    size = g.size(eqn.params["dim"])
    if isinstance(size, int):
        return g.constant(np.array(size, eqn.outvars[0].aval.dtype))
    return g.cast(g("Squeeze", size, g.axes(0)), np.dtype(eqn.outvars[0].aval.dtype))


LOWERINGS: Mapping[str, Lowering] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "expand_dims": _expand_dims,
    "transpose": _transpose,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "split": _split,
    "tile": _tile,
    "iota": _iota,
    "rev": _rev,
    "slice": _slice,
    "pad": _pad,
    "dim_as_value": _dim_as_value,
}
