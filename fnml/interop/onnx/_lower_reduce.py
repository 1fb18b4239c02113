"""Write reductions and running reductions."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fnml.interop.onnx._builder import Builder, Lowering, Port, Refused
from fnml.interop.onnx._lower_shape import shape_of
from fnml.interop.onnx._support import highest, lowest

Combine = Callable[[Builder, str, str], str]


def _reduction(op: str) -> Lowering:
    def lower(g: Builder, eqn: Any, x: str) -> str:
        axes = eqn.params["axes"]
        return g(op, x, g.axes(*axes), keepdims=0) if axes else x

    return lower


def _reduce_bool(op: str) -> Lowering:
    def lower(g: Builder, eqn: Any, x: str) -> str:
        if g.dtypes[x] != np.bool_:
            raise Refused(f"only of booleans, got {g.dtypes[x]}")
        axes = eqn.params["axes"]
        return g(op, x, g.axes(*axes), keepdims=0) if axes else x

    return lower


def _reduce_xor(g: Builder, eqn: Any, x: str) -> str:
    if g.dtypes[x] != np.bool_:
        raise Refused(f"only of booleans, got {g.dtypes[x]}")
    count = g("ReduceSum", g.cast(x, np.dtype(np.int32)), g.axes(*eqn.params["axes"]), keepdims=0)
    return g.cast(g("Mod", count, 2), np.dtype(bool))


def _reduce(g: Builder, eqn: Any, *inputs: str) -> str:
    """Write a reduction by a function of the user's, if it is one operation."""
    if len(inputs) != 2:
        raise Refused("of several arrays at once")
    x, init = inputs
    name = known_combiner(eqn.params["jaxpr"])
    ops = {"add": "Sum", "mul": "Prod", "max": "Max", "min": "Min", "or": "Max", "and": "Min"}
    if name not in ops:
        raise Refused("by a function other than add, mul, max, min, and, or")
    logical = g.dtypes[x] == np.bool_
    if name in ("and", "or") and not logical:
        raise Refused(f"by {name}, only of booleans")
    out = g(f"Reduce{ops[name]}", x, g.axes(*eqn.params["dimensions"]), keepdims=0)
    return COMBINERS[name](g, out, init)


def known_combiner(closed: Any) -> str:
    """Return the operation that a function of two scalars consists of, or ``""``."""
    jaxpr = closed.jaxpr if hasattr(closed, "jaxpr") else closed
    if len(jaxpr.eqns) != 1:
        return ""
    eqn = jaxpr.eqns[0]
    plain = set(map(id, eqn.invars)) == set(map(id, jaxpr.invars)) and len(jaxpr.invars) == 2
    name = eqn.primitive.name
    return name if plain and list(eqn.outvars) == list(jaxpr.outvars) else ""


def _arg(op: str) -> Lowering:
    def lower(g: Builder, eqn: Any, x: str) -> str:
        [axis] = eqn.params["axes"]
        found = g(op, x, axis=int(axis), keepdims=0)
        return g.cast(found, np.dtype(eqn.params["index_dtype"]))

    return lower


def _cumsum(g: Builder, eqn: Any, x: str) -> str:
    axis = np.array(eqn.params["axis"], np.int64)
    return g("CumSum", x, axis, reverse=int(eqn.params["reverse"]))


def _add(g: Builder, a: str, b: str) -> str:
    return g("Add", a, b)


def _multiply(g: Builder, a: str, b: str) -> str:
    return g("Mul", a, b)


def _maximum(g: Builder, a: str, b: str) -> str:
    return g("Or", a, b) if g.dtypes[a] == np.bool_ else g("Max", a, b)


def _minimum(g: Builder, a: str, b: str) -> str:
    return g("And", a, b) if g.dtypes[a] == np.bool_ else g("Min", a, b)


def _log_add_exp(g: Builder, a: str, b: str) -> str:
    top = g("Max", a, b)
    known = g("Where", g("Equal", top, -np.inf), 0, top)
    parts = (g("Exp", g("Sub", part, known)) for part in (a, b))
    return g("Add", g("Log", g("Add", *parts)), known)


COMBINERS: Mapping[str, Combine] = {
    "add": _add,
    "mul": _multiply,
    "max": _maximum,
    "min": _minimum,
    "or": _maximum,
    "and": _minimum,
}


def _running(combine: Combine, identity: Callable[[Any], Any]) -> Lowering:
    """Write a running reduction as a Scan along its axis."""

    def lower(g: Builder, eqn: Any, x: str) -> str:
        axis, back = int(eqn.params["axis"]), int(eqn.params["reverse"])
        shape, own = shape_of(eqn.invars[0]), g.dtypes[x]
        row = [dim for i, dim in enumerate(shape) if i != axis]
        start = g.expand(g.constant(identity(own)), (), row)

        def body(carry: str, part: str) -> list[str]:
            out = combine(g, carry, part)
            return [out, out]

        ports = [Port("carry", own, row), Port("part", own, row)]
        graph = g.subgraph(ports, body, [row, row])
        _, out = g(
            "Scan",
            start,
            x,
            count=2,
            dtype=(own, own),
            body=graph,
            num_scan_inputs=1,
            scan_input_axes=[axis],
            scan_output_axes=[axis],
            scan_input_directions=[back],
            scan_output_directions=[back],
        )
        return out

    return lower


def _one(dtype: Any) -> np.ndarray:
    return np.ones((), dtype)


LOWERINGS: Mapping[str, Lowering] = {
    "reduce_sum": _reduction("ReduceSum"),
    "reduce_prod": _reduction("ReduceProd"),
    "reduce_max": _reduction("ReduceMax"),
    "reduce_min": _reduction("ReduceMin"),
    "reduce_or": _reduce_bool("ReduceMax"),
    "reduce_and": _reduce_bool("ReduceMin"),
    "reduce_xor": _reduce_xor,
    "reduce": _reduce,
    "argmax": _arg("ArgMax"),
    "argmin": _arg("ArgMin"),
    "cumsum": _cumsum,
    "cumprod": _running(_multiply, _one),
    "cummax": _running(_maximum, lowest),
    "cummin": _running(_minimum, highest),
    "cumlogsumexp": _running(_log_add_exp, lowest),
}
