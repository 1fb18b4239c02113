"""Write shifts, counts of bits, and reinterpretation of bits."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fnml.interop.onnx._builder import Builder, Lowering, Refused, code_of

BIT_CAST_OPSET = 26


def _width(dtype: Any) -> int:
    return np.dtype(dtype).itemsize * 8


def _unsigned(dtype: Any) -> np.dtype[Any]:
    return np.dtype(f"uint{_width(dtype)}")


def _shifted(g: Builder, direction: str, x: str, by: str) -> str:
    """Shift bits; by as many as there are or more, nothing is left of them."""
    own = g.dtypes[x]
    bits, count = g.cast(x, _unsigned(own)), g.cast(by, _unsigned(own))
    known = g.constants.get(count)
    if known is not None and np.all(known < _width(own)):
        return g.cast(g("BitShift", bits, count, direction=direction), own)
    within = g("Less", count, _width(own))
    out = g("BitShift", bits, g("Where", within, count, 0), direction=direction)
    return g.cast(g("Where", within, out, 0), own)


def _shift_left(g: Builder, eqn: Any, x: str, by: str) -> str:
    return _shifted(g, "LEFT", x, by)


def _shift_right_logical(g: Builder, eqn: Any, x: str, by: str) -> str:
    return _shifted(g, "RIGHT", x, by)


def _shift_right_arithmetic(g: Builder, eqn: Any, x: str, by: str) -> str:
    if g.dtypes[x].kind == "u":
        return _shifted(g, "RIGHT", x, by)
    below = g("Less", x, 0)
    turned = g("Where", below, g("BitwiseNot", x), x)
    out = _shifted(g, "RIGHT", turned, by)
    return g("Where", below, g("BitwiseNot", out), out)


def _count(g: Builder, bits: str) -> str:
    """Count the ones of an unsigned value, by sums of ever wider fields."""
    own = g.dtypes[bits]
    width = _width(own)

    def field(size: int) -> int:
        return sum(((1 << size) - 1) << start for start in range(0, width, 2 * size))

    size = 1
    while size < width:
        high = g("BitShift", bits, np.array(size, own), direction="RIGHT")
        mask = np.array(field(size), own)
        bits = g("Add", g("BitwiseAnd", bits, mask), g("BitwiseAnd", high, mask))
        size *= 2
    return bits


def _population_count(g: Builder, eqn: Any, x: str) -> str:
    own = g.dtypes[x]
    return g.cast(_count(g, g.cast(x, _unsigned(own))), own)


def _clz(g: Builder, eqn: Any, x: str) -> str:
    own = g.dtypes[x]
    bits, size = g.cast(x, _unsigned(own)), 1
    while size < _width(own):
        lower = g("BitShift", bits, np.array(size, _unsigned(own)), direction="RIGHT")
        bits, size = g("BitwiseOr", bits, lower), size * 2
    return g.cast(_count(g, g("BitwiseNot", bits)), own)


def _bitcast(g: Builder, eqn: Any, x: str) -> str:
    own, new = g.dtypes[x], np.dtype(eqn.params["new_dtype"])
    if own == new:
        return x
    if own.itemsize != new.itemsize:
        raise Refused(f"from {own} to {new} the shape changes, which ONNX's BitCast cannot")
    if own.kind in "iu" and new.kind in "iu":
        return g.cast(x, new)
    if g.opset >= BIT_CAST_OPSET:
        return g("BitCast", x, dtype=new, to=code_of(new))
    if own.kind in "iu" and new == np.float32:
        return _to_float32(g, g.cast(x, np.dtype(np.uint32)))
    raise Refused(f"from {own} to {new} it needs BitCast: opset {BIT_CAST_OPSET} or higher")


def _to_float32(g: Builder, bits: str) -> str:
    """Read the bits of a float32 by exact arithmetic: sign, power of two, mantissa."""
    unsigned = np.dtype(np.uint32)

    def part(start: int, size: int) -> str:
        moved = g("BitShift", bits, np.array(start, unsigned), direction="RIGHT") if start else bits
        return g("BitwiseAnd", moved, np.array((1 << size) - 1, unsigned))

    mantissa, exponent = part(0, 23), g.cast(part(23, 8), np.dtype(np.int64))
    # Row 0 has no hidden bit, row 255 is infinity or NaN.
    powers = np.ldexp(1.0, np.maximum(np.arange(256), 1) - 150).astype(np.float32)
    hidden = np.where(np.arange(256) == 0, 0, 2.0**23).astype(np.float32)
    powers[255] = np.inf
    hidden[255] = 0
    digits = g("Add", g.cast(mantissa, np.dtype(np.float32)), g("Gather", hidden, exponent, axis=0))
    size = g("Mul", digits, g("Gather", powers, exponent, axis=0))
    # Without a mantissa, 0 * inf stands for infinity, and a mantissa for NaN.
    special = g("Where", g("Equal", mantissa, 0), np.float32(np.inf), np.float32(np.nan))
    size = g("Where", g("Equal", exponent, 255), special, size)
    return g("Where", g.cast(part(31, 1), np.dtype(bool)), g("Neg", size), size)


LOWERINGS: Mapping[str, Lowering] = {
    "shift_left": _shift_left,
    "shift_right_logical": _shift_right_logical,
    "shift_right_arithmetic": _shift_right_arithmetic,
    "population_count": _population_count,
    "clz": _clz,
    "bitcast_convert_type": _bitcast,
}
