"""Write arithmetic, comparisons and choices, element by element."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from fnml.interop.onnx._builder import Builder, Lowering, Refused

_ONE_TO_ONE = {
    "abs": "Abs",
    "neg": "Neg",
    "sign": "Sign",
    "floor": "Floor",
    "ceil": "Ceil",
    "add": "Add",
    "add_any": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "max": "Max",
    "min": "Min",
    "eq": "Equal",
    "lt": "Less",
    "le": "LessOrEqual",
    "gt": "Greater",
    "ge": "GreaterOrEqual",
    "exp": "Exp",
    "log": "Log",
    "tanh": "Tanh",
    "logistic": "Sigmoid",
    "sin": "Sin",
    "cos": "Cos",
    "tan": "Tan",
    "sinh": "Sinh",
    "cosh": "Cosh",
    "asin": "Asin",
    "acos": "Acos",
    "atan": "Atan",
    "asinh": "Asinh",
    "acosh": "Acosh",
    "atanh": "Atanh",
    "sqrt": "Sqrt",
    "erf": "Erf",
    "pow": "Pow",
}
_LOGICAL = {"and": "And", "or": "Or", "xor": "Xor", "not": "Not"}
# What the greatest and the smallest of two truth values are.
_OF_BOOLS = {"Max": "Or", "Min": "And", "Mul": "And", "Add": "Or"}


def is_float(g: Builder, x: str) -> bool:
    """Tell whether a value is floating point."""
    return bool(jnp.issubdtype(g.dtypes[x], jnp.floating))


def _direct(op: str) -> Lowering:
    def lower(g: Builder, eqn: Any, *inputs: str) -> str:
        if g.dtypes[inputs[0]] == np.bool_ and op in _OF_BOOLS:
            return g.elementwise(_OF_BOOLS[op], *inputs)
        return g.elementwise(op, *inputs)

    return lower


def _bitwise(name: str) -> Lowering:
    def lower(g: Builder, eqn: Any, *inputs: str) -> str:
        logical = g.dtypes[inputs[0]] == np.bool_
        return g.elementwise(("" if logical else "Bitwise") + _LOGICAL[name], *inputs)

    return lower


def _ne(g: Builder, eqn: Any, a: str, b: str) -> str:
    if g.dtypes[a] == np.bool_:
        return g.elementwise("Xor", a, b)
    return g("Not", g.elementwise("Equal", a, b))


def _div(g: Builder, eqn: Any, a: str, b: str) -> str:
    known = g.constants.get(b)
    if is_float(g, a) or (known is not None and np.all(known != 0)):
        return g.elementwise("Div", a, b)
    # A division by 0 ends a process; XLA's result is -1, all bits set.
    none = g("Equal", b, 0)
    quotient = g.elementwise("Div", a, g("Where", none, 1, b))
    ones = np.invert(np.zeros((), g.dtypes[a]))
    return g.elementwise("Where", none, ones, quotient)


def _rem(g: Builder, eqn: Any, a: str, b: str) -> str:
    known = g.constants.get(b)
    if is_float(g, a) or (known is not None and np.all(known != 0)):
        return g.elementwise("Mod", a, b, fmod=1)
    none = g("Equal", b, 0)
    rest = g.elementwise("Mod", a, g("Where", none, 1, b), fmod=1)
    return g.elementwise("Where", none, a, rest)


def _square(g: Builder, eqn: Any, x: str) -> str:
    return g("Mul", x, x)


def _integer_pow(g: Builder, eqn: Any, x: str) -> str:
    power = int(eqn.params["y"])
    result, factor, left = None, x, abs(power)
    while left:
        if left & 1:
            result = factor if result is None else g("Mul", result, factor)
        left >>= 1
        if left:
            factor = g("Mul", factor, factor)
    if result is None:
        one = np.ones((), g.dtypes[x])
        return g.expand(g.constant(one), (), eqn.outvars[0].aval.shape)
    return g("Reciprocal", result) if power < 0 else result


def _rsqrt(g: Builder, eqn: Any, x: str) -> str:
    return g("Reciprocal", g("Sqrt", x))


def _cbrt(g: Builder, eqn: Any, x: str) -> str:
    return g("Mul", g("Sign", x), g("Pow", g("Abs", x), 1 / 3))


def _exp2(g: Builder, eqn: Any, x: str) -> str:
    return g("Pow", np.array(2, g.dtypes[x]), x)


def _round(g: Builder, eqn: Any, x: str) -> str:
    if int(eqn.params["rounding_method"]) == 1:
        return g("Round", x)
    size = g("Abs", x)
    whole = g("Floor", size)
    up = g.cast(g("GreaterOrEqual", g("Sub", size, whole), 0.5), g.dtypes[x])
    return g("Mul", g("Sign", x), g("Add", whole, up))


def _is_finite(g: Builder, eqn: Any, x: str) -> str:
    return g("Less", g("Abs", x), np.array(np.inf, g.dtypes[x]))


def _clamp(g: Builder, eqn: Any, low: str, x: str, high: str) -> str:
    return g("Min", g("Max", x, low), high)


def _select_n(g: Builder, eqn: Any, which: str, *cases: str) -> str:
    if g.dtypes[which] == np.bool_:
        return g.elementwise("Where", which, cases[1], cases[0])
    result = cases[-1]
    for number in range(len(cases) - 2, -1, -1):
        here = g("Equal", which, number)
        result = g("Where", here, cases[number], result)
    return result


def _convert(g: Builder, eqn: Any, x: str) -> str:
    return g.cast(x, np.dtype(eqn.params["new_dtype"]))


def _reduce_precision(g: Builder, eqn: Any, x: str) -> str:
    bits = (eqn.params["exponent_bits"], eqn.params["mantissa_bits"])
    formats = {(5, 10): np.float16, (8, 7): ml_dtypes.bfloat16, (8, 23): np.float32}
    own = g.dtypes[x]
    info = jnp.finfo(own)
    if bits[0] >= info.nexp and bits[1] >= info.nmant:
        return x
    if bits not in formats:
        raise Refused(f"{bits[0]} exponent and {bits[1]} mantissa bits are no dtype's")
    return g.cast(g.cast(x, np.dtype(formats[bits])), own)


def _atan2(g: Builder, eqn: Any, y: str, x: str) -> str:
    own = g.dtypes[x]
    zero = np.zeros((), own)
    side = g("Where", g("Less", y, zero), np.array(-np.pi, own), np.array(np.pi, own))
    level = g("Equal", x, zero)
    slope = g("Atan", g.elementwise("Div", y, g("Where", level, 1, x)))
    slope = g("Where", g("Less", x, zero), g("Add", slope, side), slope)
    upright = g("Where", g("Equal", y, zero), zero, g("Mul", side, 0.5))
    return g.elementwise("Where", level, upright, slope)


def _same(g: Builder, eqn: Any, *inputs: str) -> Any:
    return list(inputs)


LOWERINGS: Mapping[str, Lowering] = {
    **{name: _direct(op) for name, op in _ONE_TO_ONE.items()},
    **{name: _bitwise(name) for name in _LOGICAL},
    **dict.fromkeys(("copy", "copy_p", "name", "stop_gradient", "optimization_barrier"), _same),
    **dict.fromkeys(("device_put", "sharding_constraint", "layout_constraint", "pvary"), _same),
    "ne": _ne,
    "eq_to": _direct("Equal"),
    "lt_to": _direct("Less"),
    "le_to": _direct("LessOrEqual"),
    "div": _div,
    "rem": _rem,
    "square": _square,
    "integer_pow": _integer_pow,
    "rsqrt": _rsqrt,
    "cbrt": _cbrt,
    "exp2": _exp2,
    "round": _round,
    "is_finite": _is_finite,
    "clamp": _clamp,
    "select_n": _select_n,
    "convert_element_type": _convert,
    "reduce_precision": _reduce_precision,
    "atan2": _atan2,
}
