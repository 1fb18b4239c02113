"""Write reductions over sliding windows as pooling, and the gradients of pooling."""

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fnml.interop.onnx._builder import Builder, Lowering, Refused
from fnml.interop.onnx._lower_reduce import COMBINERS, known_combiner
from fnml.interop.onnx._lower_shape import pad, shape_of, slice_along
from fnml.interop.onnx._shapes import all_static
from fnml.interop.onnx._support import highest, lowest, zero

_MOST_SHIFTS = 1024


class _Windows(NamedTuple):
    """Windows over an array: sizes, strides and dilations by axis, padded and spread before."""

    shape: tuple[Any, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]

    @property
    def axes(self) -> list[int]:
        """The axes along which something happens."""
        each = zip(self.sizes, self.strides, strict=True)
        return [i for i, (size, stride) in enumerate(each) if size != 1 or stride != 1]


def _padded(g: Builder, eqn: Any, x: str, value: np.ndarray) -> tuple[str, _Windows]:
    """Pad an operand, and say what windows slide over it then."""
    params, shape = eqn.params, list(shape_of(eqn.invars[-1 if "select_prim" in eqn.params else 0]))
    spread = params.get("base_dilation") or (1,) * len(shape)
    pads = params["padding"]
    if not all_static(*pads):
        raise Refused("with a padding of symbolic size")
    config = [(int(low), int(high), s - 1) for (low, high), s in zip(pads, spread, strict=True)]
    x = pad(g, x, shape, value, config)
    for i, (low, high, between) in enumerate(config):
        grown = shape[i] + (shape[i] - 1) * between if between else shape[i]
        shape[i] = grown + low + high
    return x, _Windows(
        tuple(shape),
        tuple(params["window_dimensions"]),
        tuple(params["window_strides"]),
        tuple(params.get("window_dilation") or (1,) * len(shape)),
    )


_IDENTITIES = {"max": lowest, "min": highest, "add": zero}


def _reduce_window(name: str) -> Lowering:
    def lower(g: Builder, eqn: Any, x: str) -> str:
        x, windows = _padded(g, eqn, x, _IDENTITIES[name](g.dtypes[x]))
        return _reduced(g, x, windows, name)

    return lower


def _generic(g: Builder, eqn: Any, *inputs: str) -> str:
    name = known_combiner(eqn.params["jaxpr"])
    if len(inputs) != 2 or name not in COMBINERS:
        raise Refused("other than of one array by add, mul, max, min, and, or")
    x, init = inputs
    known = g.constants.get(init)
    if known is None:
        raise Refused("from an initial value that is computed")
    # The padding holds the initial value, and every window begins with it.
    x, windows = _padded(g, eqn, x, known)
    if name in _IDENTITIES and known == _IDENTITIES[name](known.dtype):
        return _reduced(g, x, windows, name)
    return COMBINERS[name](g, _shifted(g, x, windows, name), init)


def _reduced(g: Builder, x: str, windows: _Windows, name: str) -> str:
    axes = windows.axes
    if not axes:
        return x
    floating = g.dtypes[x].kind == "f" or g.dtypes[x].name == "bfloat16"
    pooled = all_static([windows.shape[i] for i in axes]) and len(axes) <= 3
    if not floating or not pooled or (name == "add" and set(windows.dilations) != {1}):
        return _shifted(g, x, windows, name)
    rows = _Rows(windows)
    attributes: dict[str, Any] = {
        "kernel_shape": [windows.sizes[i] for i in axes],
        "strides": [windows.strides[i] for i in axes],
    }
    if name == "add":
        out = g("AveragePool", rows.bring(g, x), **attributes)
        return rows.back(g, g("Mul", out, math.prod(attributes["kernel_shape"])))
    attributes["dilations"] = [windows.dilations[i] for i in axes]
    if name == "max":
        return rows.back(g, g("MaxPool", rows.bring(g, x), **attributes))
    return rows.back(g, g("Neg", g("MaxPool", rows.bring(g, g("Neg", x)), **attributes)))


def _shifted(g: Builder, x: str, windows: _Windows, name: str) -> str:
    """Combine the elements of all windows, place by place: any operation, any dtype."""
    axes = windows.axes
    sizes = [windows.sizes[i] for i in axes]
    if math.prod(sizes) > _MOST_SHIFTS:
        raise Refused(f"over windows of {math.prod(sizes)} elements, more than {_MOST_SHIFTS}")
    out: str | None = None
    counts = _counts(windows)
    for place in itertools.product(*map(range, sizes)):
        starts = [p * windows.dilations[i] for p, i in zip(place, axes, strict=True)]
        stops = [
            start + (counts[i] - 1) * windows.strides[i] + 1
            for start, i in zip(starts, axes, strict=True)
        ]
        part = slice_along(g, x, axes, starts, stops, [windows.strides[i] for i in axes])
        out = part if out is None else COMBINERS[name](g, out, part)
    return x if out is None else out


def _counts(windows: _Windows) -> list[Any]:
    """Return how many windows there are along each axis."""
    each = zip(*windows, strict=True)
    return [(dim - (size - 1) * hole - 1) // stride + 1 for dim, size, stride, hole in each]


class _Rows(NamedTuple):
    """The layout that pooling wants: [rows, channels, ...], the axes of the windows last."""

    windows: _Windows

    @property
    def _order(self) -> list[int]:
        axes = self.windows.axes
        return [*(i for i in range(len(self.windows.shape)) if i not in axes), *axes]

    def _shapes(self, pooled: bool) -> tuple[list[Any], list[Any]]:
        """Return the shape with the windows' axes last, and that with two axes before them."""
        sizes = _counts(self.windows) if pooled else self.windows.shape
        axes = self.windows.axes
        others = [self.windows.shape[i] for i in range(len(sizes)) if i not in axes]
        lead = others if len(others) == 2 else [1, math.prod(others)]
        inner = [sizes[i] for i in axes]
        return [*others, *inner], [*lead, *inner]

    @property
    def pooling_shape(self) -> list[Any]:
        """The shape of the operand in the layout."""
        return self._shapes(False)[1]

    def bring(self, g: Builder, x: str, *, pooled: bool = False) -> str:
        """Bring an array into the layout; ``pooled`` for one of the results' shape."""
        return g.reshape(g.transpose(x, self._order), *self._shapes(pooled))

    def back(self, g: Builder, x: str, *, pooled: bool = True) -> str:
        """Undo :meth:`bring`."""
        x = g.reshape(x, *reversed(self._shapes(pooled)))
        return g.transpose(x, np.argsort(self._order).tolist())


def _chosen(g: Builder, eqn: Any, operand: str) -> tuple[_Rows, str]:
    """Return which element each window chooses: its number in the pooling layout, int64."""
    chooses = eqn.params["select_prim"].name
    if chooses not in ("ge", "le"):
        raise Refused(f"that selects by {chooses}")
    if chooses == "le":
        operand = g("Neg", operand)
    operand, windows = _padded(g, eqn, operand, lowest(g.dtypes[operand]))
    axes = windows.axes
    if not all_static([windows.shape[i] for i in axes]) or not 1 <= len(axes) <= 3:
        raise Refused("over one to three axes of known size only")
    rows = _Rows(windows)
    _, places = g(
        "MaxPool",
        rows.bring(g, operand),
        count=2,
        dtype=(g.dtypes[operand], np.dtype(np.int64)),
        kernel_shape=[windows.sizes[i] for i in axes],
        strides=[windows.strides[i] for i in axes],
        dilations=[windows.dilations[i] for i in axes],
    )
    return rows, places


def _select_and_scatter_add(g: Builder, eqn: Any, source: str, operand: str) -> str:
    rows, places = _chosen(g, eqn, operand)
    shape, nothing = rows.windows.shape, zero(g.dtypes[source])
    values = g("Reshape", rows.bring(g, source, pooled=True), g.axes(-1))
    start = g.expand(g.constant(nothing), (), [math.prod(shape)])
    flat = g("Reshape", places, g.axes(-1))
    total = g("ScatterElements", start, flat, values, axis=0, reduction="add")
    total = g("Reshape", total, g.vector(rows.pooling_shape))
    undo = [(-int(low), -int(high), 0) for low, high in eqn.params["padding"]]
    return pad(g, rows.back(g, total, pooled=False), shape, nothing, undo)


def _select_and_gather_add(g: Builder, eqn: Any, tangents: str, operand: str) -> str:
    rows, places = _chosen(g, eqn, operand)
    padded, _ = _padded(g, eqn, tangents, zero(g.dtypes[tangents]))
    flat = g("Reshape", rows.bring(g, padded), g.axes(-1))
    return rows.back(g, g("Gather", flat, places, axis=0))


LOWERINGS: Mapping[str, Lowering] = {
    "reduce_window_max": _reduce_window("max"),
    "reduce_window_min": _reduce_window("min"),
    "reduce_window_sum": _reduce_window("add"),
    "reduce_window": _generic,
    "select_and_scatter_add": _select_and_scatter_add,
    "select_and_gather_add": _select_and_gather_add,
}
