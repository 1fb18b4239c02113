"""Write slices whose place is computed, in operations whose sizes do not depend on values.

ONNX's own Slice would do, but with a computed start its size is known only when it runs: no
compiler, XLA's among them, could import the file again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fnml.interop.onnx._builder import Builder, Lowering
from fnml.interop.onnx._lower_shape import arange, shape_of
from fnml.interop.onnx._shapes import is_static

_INT64 = np.dtype(np.int64)


def _start(g: Builder, at: str, dim: Any, size: Any) -> str:
    """Return where a slice begins, int64 ``[1]``, moved so that it fits."""
    start = g("Max", g.cast(at, _INT64), 0)
    return g("Min", g("Unsqueeze", start, g.axes(0)), g.vector([dim - size]))


def _moved(shape: Sequence[Any], sizes: Sequence[Any]) -> list[int]:
    """Return the axes along which a slice can begin elsewhere than at 0."""
    return [i for i, dim in enumerate(shape) if sizes[i] != dim]


def _dynamic_slice(g: Builder, eqn: Any, x: str, *at: str) -> str:
    shape, sizes = shape_of(eqn.invars[0]), eqn.params["slice_sizes"]
    for axis in _moved(shape, sizes):
        start = _start(g, at[axis], shape[axis], sizes[axis])
        one = is_static(sizes[axis]) and sizes[axis] == 1
        places = start if one else g("Add", start, arange(g, sizes[axis], _INT64))
        x = g("Gather", x, places, axis=axis)
    return x


def _dynamic_update_slice(g: Builder, eqn: Any, x: str, update: str, *at: str) -> str:
    shape, sizes = shape_of(eqn.invars[0]), shape_of(eqn.invars[1])
    inside: str | None = None
    for axis in _moved(shape, sizes):
        if is_static(sizes[axis]) and sizes[axis] == 0:
            return x
        start = _start(g, at[axis], shape[axis], sizes[axis])
        offset = g("Sub", arange(g, shape[axis], _INT64), start)
        if is_static(sizes[axis]) and sizes[axis] == 1:
            here = g("Equal", offset, 0)
        else:
            last = g.vector([sizes[axis] - 1])
            fits = g("Min", g("Max", offset, 0), last)
            here = g("Equal", offset, fits)
            update = g("Gather", update, fits, axis=axis)
        after = len(shape) - 1 - axis
        here = g("Unsqueeze", here, g.axes(*range(1, 1 + after))) if after else here
        inside = here if inside is None else g("And", inside, here)
    return update if inside is None else g("Where", inside, update, x)


LOWERINGS: Mapping[str, Lowering] = {
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
}
