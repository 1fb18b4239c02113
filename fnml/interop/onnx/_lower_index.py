"""Write gathers and scatters of any form as GatherND and ScatterND on rearranged operands."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fnml.interop.onnx._builder import Builder, Lowering, Refused, elements
from fnml.interop.onnx._lower_shape import arange, pad, shape_of, slice_along
from fnml.interop.onnx._support import highest, lowest, zero

_INT64 = np.dtype(np.int64)


class _Plan(NamedTuple):
    """Where the windows of a gather or scatter lie.

    Attributes:
      shape: of the operand.
      batch: the indices' shape without the last axis.
      sizes: the window's size along each axis of the operand.
      by_index: ``by_index[k]`` is the axis that the indices' column k counts along.
      single: axes along which a window has no axis of its own.
      paired: for an axis that is batched, the indices' axis that it goes along with.
    """

    shape: tuple[Any, ...]
    batch: tuple[Any, ...]
    sizes: tuple[Any, ...]
    by_index: tuple[int, ...]
    single: tuple[int, ...]
    paired: dict[int, int]

    @property
    def indexed(self) -> list[int]:
        """The axes that have to be addressed: those that a window does not cover, or drops."""
        found = [
            axis
            for axis in range(len(self.shape))
            if axis in self.single or self.sizes[axis] != self.shape[axis]
        ]
        order = {axis: k for k, axis in enumerate(self.by_index)}
        return sorted(found, key=lambda axis: order.get(axis, len(order) + axis))

    @property
    def covered(self) -> list[int]:
        """The axes that every window covers whole."""
        indexed = self.indexed
        return [axis for axis in range(len(self.shape)) if axis not in indexed]

    @property
    def windowed(self) -> list[int]:
        """The addressed axes along which a window has an axis."""
        return [axis for axis in self.indexed if axis not in self.single]

    @property
    def order(self) -> list[tuple[str, int]]:
        """The axes of what GatherND gives: those of the indices, of windows, of the operand."""
        batch = [("batch", i) for i in range(len(self.batch))]
        return [*batch, *(("axis", d) for d in (*self.windowed, *self.covered))]


def _known(g: Builder, start: str, low: Any, high: Sequence[Any]) -> bool:
    """Tell whether all starts are known, and lie where they fit."""
    value = g.constants.get(start)
    if value is None or not all(isinstance(h, int | np.integer) for h in high):
        return False
    return bool(np.all((value >= low) & (value <= np.array(high, np.int64))))


def _starts(g: Builder, plan: _Plan, start: str, mode: str) -> tuple[str, str | None]:
    """Return starts that fit, int64 ``[batch..., K]``, and which were so before (``None``: all)."""
    start = g.cast(start, _INT64)
    limits = [plan.shape[d] - plan.sizes[d] for d in plan.by_index]
    if not limits or _known(g, start, 0, limits):
        return start, None
    fit = g("Min", g("Max", start, g.axes(*[0] * len(limits))), g.vector(limits))
    # What was promised and is not so, XLA clips: runtimes would end the call.
    if mode in ("CLIP", "PROMISE_IN_BOUNDS"):
        return fit, None
    same = g("Equal", start, fit)
    if len(limits) == 1:
        return fit, g("Squeeze", same, g.axes(-1))
    return fit, g("ReduceMin", same, g.axes(-1), keepdims=0)


def _places(g: Builder, plan: _Plan, start: str) -> str:
    """Return the address of every element of every window, ``[batch..., windows..., n]``."""
    indexed, windowed = plan.indexed, plan.windowed
    if not windowed and tuple(indexed) == plan.by_index:
        return start
    rank = len(plan.batch) + len(windowed)
    whole = [*plan.batch, *(plan.sizes[d] for d in windowed)]
    columns = []
    for axis in indexed:
        column: Any = None
        if axis in plan.by_index:
            k = plan.by_index.index(axis)
            column = slice_along(g, start, [len(plan.batch)], [k], [k + 1])
            after = [len(plan.batch) + i for i in range(len(windowed))]
            column = g("Unsqueeze", column, g.axes(*after)) if after else column
        elif axis in plan.paired:
            column = _line(g, plan.shape[axis], plan.paired[axis], rank + 1)
        if axis in windowed:
            along = len(plan.batch) + windowed.index(axis)
            line = _line(g, plan.sizes[axis], along, rank + 1)
            column = line if column is None else g("Add", column, line)
        if column is None:
            column = g.constant(np.zeros((1,) * (rank + 1), np.int64))
        columns.append(g("Expand", column, g.vector([*whole, 1])))
    return columns[0] if len(columns) == 1 else g("Concat", *columns, axis=rank)


def _line(g: Builder, size: Any, axis: int, rank: int) -> str:
    others = [i for i in range(rank) if i != axis]
    return g.unsqueeze(arange(g, size, np.int64), others, 1)


def _gather(g: Builder, eqn: Any, x: str, start: str) -> str:
    numbers, mode = eqn.params["dimension_numbers"], eqn.params["mode"].name
    batch = shape_of(eqn.invars[1])[:-1]
    paired = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    plan = _Plan(
        shape_of(eqn.invars[0]),
        batch,
        tuple(eqn.params["slice_sizes"]),
        tuple(numbers.start_index_map),
        (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims),
        dict(paired),
    )
    if mode == "ONE_HOT":
        raise Refused("in mode one_hot")
    start, valid = _starts(g, plan, start, mode)
    own = [d for d in range(len(plan.shape)) if d not in plan.single]
    rest = [i for i in range(len(batch) + len(own)) if i not in numbers.offset_dims]
    wanted = {p: ("batch", i) for i, p in enumerate(rest)}
    wanted |= {p: ("axis", d) for p, d in zip(numbers.offset_dims, own, strict=True)}
    indexed, order = plan.indexed, plan.order
    if len(indexed) == 1 and tuple(indexed) == plan.by_index and not plan.windowed:
        [axis] = indexed
        out = g("Gather", x, g("Squeeze", start, g.axes(-1)), axis=axis)
        batched = [("batch", i) for i in range(len(batch))]
        order = [("axis", d) for d in range(axis)] + batched
        order += [("axis", d) for d in range(axis + 1, len(plan.shape))]
    elif indexed:
        x = g.transpose(x, [*indexed, *plan.covered])
        out = g("GatherND", x, _places(g, plan, start))
    else:
        ones = [1] * len(batch) + list(plan.shape)
        placed = g.reshape(x, plan.shape, ones)
        out = g("Expand", placed, g.vector([*batch, *plan.shape]))
    out = g.transpose(out, [order.index(wanted[p]) for p in range(len(wanted))])
    if valid is None:
        return out
    if numbers.offset_dims:
        valid = g("Unsqueeze", valid, g.axes(*numbers.offset_dims))
    return g("Where", valid, out, _fill(eqn.params["fill_value"], g.dtypes[out]))


def _fill(value: Any, dtype: np.dtype[Any]) -> np.ndarray:
    if value is not None:
        return np.asarray(value, dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return np.array(np.nan, dtype)
    return lowest(dtype) if dtype.kind == "i" else highest(dtype)


def _scatter(reduction: str, neutral: Any) -> Lowering:
    def lower(g: Builder, eqn: Any, x: str, start: str, updates: str) -> str:
        numbers, mode = eqn.params["dimension_numbers"], eqn.params["mode"].name
        shape, given = shape_of(eqn.invars[0]), shape_of(eqn.invars[2])
        single = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
        own = [d for d in range(len(shape)) if d not in single]
        sizes: list[Any] = [1] * len(shape)
        for axis, position in zip(own, numbers.update_window_dims, strict=True):
            sizes[axis] = given[position]
        pairs = zip(
            numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True
        )
        plan = _Plan(
            shape,
            shape_of(eqn.invars[1])[:-1],
            tuple(sizes),
            tuple(numbers.scatter_dims_to_operand_dims),
            single,
            dict(pairs),
        )
        if neutral is None:
            _check_replaces(eqn)
        start, valid = _starts(g, plan, start, mode)
        rest = [i for i in range(len(given)) if i not in numbers.update_window_dims]
        if valid is not None and neutral is not None:
            axes = numbers.update_window_dims
            where = g("Unsqueeze", valid, g.axes(*axes)) if axes else valid
            updates = g("Where", where, updates, neutral(g.dtypes[x]))
        position = {("batch", i): p for i, p in enumerate(rest)}
        position |= {("axis", d): p for d, p in zip(own, numbers.update_window_dims, strict=True)}
        updates = g.transpose(updates, [position[entry] for entry in plan.order])
        if neutral is None:
            return _replaced(g, plan, x, start, updates, valid)
        # onnxruntime 1.32 runs ScatterND's reductions in several threads that do not wait for each
        # other: where two updates meet, some are lost. Its ScatterElements does not.
        apart = eqn.params["unique_indices"] or plan.batch in ((), (1,))
        write = _by_address if apart else _by_row
        return write(g, plan, x, start, updates, reduction)

    return lower


def _by_address(g: Builder, plan: _Plan, x: str, start: str, updates: str, reduction: str) -> str:
    """Combine updates with the operand, where no two meet."""
    x, _, back = _opened(g, plan, x)
    out = g("ScatterND", x, _addresses(g, plan, start), updates, reduction=reduction)
    return back(out)


def _by_row(g: Builder, plan: _Plan, x: str, start: str, updates: str, reduction: str) -> str:
    """Combine updates with the operand, as rows of a matrix: some may meet."""
    x, shape, back = _opened(g, plan, x)
    addressed = shape[: max(len(plan.indexed), 1)]
    columns = elements(shape[len(addressed) :])
    rows = elements([*plan.batch, *(plan.sizes[d] for d in plan.windowed)])
    places = _addresses(g, plan, start)
    if len(addressed) > 1:
        steps = g.vector([elements(addressed[i + 1 :]) for i in range(len(addressed))])
        places = g("ReduceSum", g("Mul", places, steps), g.axes(-1), keepdims=0)
    places = g("Expand", g("Reshape", places, g.axes(-1, 1)), g.vector([rows, columns]))
    matrix = g("Reshape", x, g.vector([elements(addressed), columns]))
    updates = g("Reshape", updates, g.vector([rows, columns]))
    out = g("ScatterElements", matrix, places, updates, axis=0, reduction=reduction)
    return back(g("Reshape", out, g.vector(shape)))


def _replaced(g: Builder, plan: _Plan, x: str, start: str, updates: str, valid: str | None) -> str:
    """Put updates in the place of what is there; those that have no place, nowhere."""
    x, shape, back = _opened(g, plan, x)
    places = _addresses(g, plan, start)
    if valid is None:
        return back(g("ScatterND", x, places, updates))
    # What has no place goes to one row more, which is cut off again.
    x = pad(g, x, shape, zero(g.dtypes[x]), [(0, 1, 0), *[(0, 0, 0)] * (len(shape) - 1)])
    windows = [len(plan.batch) + i for i in range(len(plan.windowed) + 1)]
    outside = g.vector([shape[0], *[0] * (max(len(plan.indexed), 1) - 1)])
    places = g("Where", g("Unsqueeze", valid, g.axes(*windows)), places, outside)
    return back(slice_along(g, g("ScatterND", x, places, updates), [0], [0], [shape[0]]))


def _opened(g: Builder, plan: _Plan, x: str) -> tuple[str, list[Any], Callable[[str], str]]:
    """Return the operand with the addressed axes first, at least one, and how to undo that."""
    order = [*plan.indexed, *plan.covered]
    shape = [plan.shape[d] for d in order]
    undo = np.argsort(order).tolist()
    x = g.transpose(x, order)
    if plan.indexed:
        return x, shape, lambda out: g.transpose(out, undo)
    opened = g("Unsqueeze", x, g.axes(0))
    return opened, [1, *shape], lambda out: g.transpose(g("Squeeze", out, g.axes(0)), undo)


def _addresses(g: Builder, plan: _Plan, start: str) -> str:
    if plan.indexed:
        return _places(g, plan, start)
    return g("Expand", np.int64(0), g.vector([*plan.batch, 1]))


def _check_replaces(eqn: Any) -> None:
    """Refuse a scatter that computes something of old and new values."""
    closed = eqn.params["update_jaxpr"]
    if closed is None:
        return
    jaxpr = closed.jaxpr if hasattr(closed, "jaxpr") else closed
    if jaxpr.eqns or jaxpr.outvars[0] is not jaxpr.invars[1]:
        raise Refused("by a function of the user's (lax.scatter_apply)")


def _scatter_sub(g: Builder, eqn: Any, x: str, start: str, updates: str) -> str:
    return _scatter("add", zero)(g, eqn, x, start, g("Neg", updates))


def _one(dtype: Any) -> np.ndarray:
    return np.ones((), dtype)


LOWERINGS: Mapping[str, Lowering] = {
    "gather": _gather,
    "scatter": _scatter("none", None),
    "scatter-add": _scatter("add", zero),
    "scatter-sub": _scatter_sub,
    "scatter-mul": _scatter("mul", _one),
    "scatter-min": _scatter("min", highest),
    "scatter-max": _scatter("max", lowest),
}
