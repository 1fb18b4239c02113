"""What onnxruntime's CPU provider computes in which dtypes, and the detours around the rest.

Measured with onnxruntime 1.32, opset 21. An operator that is not listed moves data without looking
at it and takes every dtype. A detour costs two casts and gives the value that XLA's CPU backend
gives: it, too, computes bfloat16 in float32, and integers modulo a power of two.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

_REAL = frozenset(["float16", "float32", "float64"])
_HALF = frozenset(["float16", "float32"])
_MOST = frozenset(("int32", "int64", *_REAL))
_BYTES = frozenset(("int8", "uint8"))
_UNSIGNED = frozenset(["uint8", "uint16", "uint32", "uint64"])
_SIGNED = frozenset(["int8", "int16", "int32", "int64"])
_INTEGERS = _SIGNED | _UNSIGNED
_NUMBERS = _INTEGERS | _REAL
_BOOL = frozenset(("bool",))

_RUNS: dict[str, frozenset[str]] = {
    **dict.fromkeys(["Abs", "Sign", "Add", "Sub", "Mul", "Div", "Mod"], _NUMBERS),
    **dict.fromkeys(["Less", "LessOrEqual", "Greater", "GreaterOrEqual"], _NUMBERS),
    **dict.fromkeys(["BitwiseNot", "BitwiseAnd", "BitwiseOr", "BitwiseXor"], _INTEGERS),
    **dict.fromkeys(
        [
            "Floor",
            "Ceil",
            "Round",
            "Exp",
            "Log",
            "Tanh",
            "Sigmoid",
            "Sin",
            "Cos",
            "Sqrt",
            "Reciprocal",
        ],
        _REAL,
    ),
    **dict.fromkeys(
        ["Tan", "Sinh", "Cosh", "Asin", "Acos", "Atan", "Asinh", "Acosh", "Atanh", "Erf"], _HALF
    ),
    **dict.fromkeys(["Conv", "ConvTranspose", "AveragePool"], _HALF),
    **dict.fromkeys(["Einsum", "ReduceSum", "ReduceProd", "CumSum", "Pow"], _MOST),
    **dict.fromkeys(["ArgMax", "ArgMin"], _MOST | _BYTES),
    **dict.fromkeys(["ReduceMax", "ReduceMin"], _MOST | _BYTES),
    **dict.fromkeys(["Max", "Min"], _MOST | {"uint32", "uint64"}),
    "Neg": _SIGNED | _REAL,
    "Equal": _NUMBERS | _BOOL,
    "MatMul": _MOST | {"uint32", "uint64"},
    "BitShift": _UNSIGNED,
    "Where": _MOST | _BYTES | {"uint32"},
    "TopK": _MOST,
    "MaxPool": _REAL | _BYTES,
    "Pad": _MOST | _BYTES | _BOOL | {"uint32", "uint64", "bfloat16"},
    "Range": frozenset(["int16", "int32", "int64", "float32", "float64"]),
    "Expand": _NUMBERS | _BOOL,
    **{f"Scatter{kind}": _NUMBERS | _BOOL for kind in ("ND", "Elements")},
}
_WIDER: dict[str, tuple[str, ...]] = {
    "bool": ("uint8", "int32"),
    "int8": ("int16", "int32"),
    "uint8": ("int16", "int32"),
    "int16": ("int32",),
    "uint16": ("int32",),
    "uint32": ("uint64", "int64"),
    "uint64": ("int64",),
    "float16": ("float32",),
    "bfloat16": ("float32",),
}
# The last resort of an operator on integers that has a kernel for floating point only.
_EXACT = {"int8": "float32", "uint8": "float32", "int16": "float32", "uint16": "float32"}


def computed_in(op: str, dtype: Any) -> np.dtype[Any]:
    """Return the dtype to compute an operator in; ``dtype`` itself where nothing else would do.

    >>> computed_in("Add", np.float32), computed_in("Where", np.uint16), computed_in("Exp", "f8")
    (dtype('float32'), dtype('int32'), dtype('float64'))
    """
    dtype = np.dtype(dtype)
    runs = _RUNS.get(op)
    if runs is None or dtype.name in runs:
        return dtype
    for wider in (*_WIDER.get(dtype.name, ()), _EXACT.get(dtype.name, "")):
        if wider in runs:
            return np.dtype(wider)
    return dtype


def widest(*dtypes: Any) -> np.dtype[Any]:
    """Return the dtype that holds products of all of these, whatever promotion the user allows."""
    with jax.numpy_dtype_promotion("standard"):
        return np.dtype(functools.reduce(jnp.promote_types, dtypes))


def zero(dtype: Any) -> np.ndarray:
    """Return a scalar 0 of a dtype, ml_dtypes' included."""
    return np.zeros((), dtype)


def lowest(dtype: Any) -> np.ndarray:
    """Return the smallest value of a dtype, ``-inf`` for floating point: the identity of max."""
    return _extreme(np.dtype(dtype), -1)


def highest(dtype: Any) -> np.ndarray:
    """Return the largest value of a dtype, ``inf`` for floating point: the identity of min."""
    return _extreme(np.dtype(dtype), 1)


def _extreme(dtype: np.dtype[Any], sign: int) -> np.ndarray:
    if dtype == np.bool_:
        return np.array(sign > 0)
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return np.array(info.max if sign > 0 else info.min, dtype)
    if dtype.kind != "f" and dtype != ml_dtypes.bfloat16:
        raise TypeError(f"{dtype} has no infinity")
    return np.array(sign * np.inf, dtype)
