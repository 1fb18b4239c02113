"""ONNX's element types as dtypes, and the narrowing that JAX does without 64 bit."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from fnml.core import ShapeError

# By the numbers of TensorProto.DataType. A string is a Python object.
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.float32),
    2: np.dtype(np.uint8),
    3: np.dtype(np.int8),
    4: np.dtype(np.uint16),
    5: np.dtype(np.int16),
    6: np.dtype(np.int32),
    7: np.dtype(np.int64),
    8: np.dtype(object),
    9: np.dtype(np.bool_),
    10: np.dtype(np.float16),
    11: np.dtype(np.float64),
    12: np.dtype(np.uint32),
    13: np.dtype(np.uint64),
    14: np.dtype(np.complex64),
    15: np.dtype(np.complex128),
    16: np.dtype(ml_dtypes.bfloat16),
    17: np.dtype(ml_dtypes.float8_e4m3fn),
    18: np.dtype(ml_dtypes.float8_e4m3fnuz),
    19: np.dtype(ml_dtypes.float8_e5m2),
    20: np.dtype(ml_dtypes.float8_e5m2fnuz),
    21: np.dtype(ml_dtypes.uint4),
    22: np.dtype(ml_dtypes.int4),
    23: np.dtype(ml_dtypes.float4_e2m1fn),
    24: np.dtype(ml_dtypes.float8_e8m0fnu),
    25: np.dtype(ml_dtypes.uint2),
    26: np.dtype(ml_dtypes.int2),
    27: np.dtype(ml_dtypes.float6_e2m3fn),
    28: np.dtype(ml_dtypes.float6_e3m2fn),
}


def canonical(dtype: Any) -> np.dtype[Any]:
    """Return the dtype in which JAX computes what ONNX calls ``dtype``."""
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


def widest(*dtypes: Any) -> np.dtype[Any]:
    """Return the dtype that holds all of them, also where promotion is strict."""
    with jax.numpy_dtype_promotion("standard"):
        return np.dtype(jnp.result_type(*dtypes))


def is_float(dtype: Any) -> bool:
    """Tell whether ``dtype`` is a floating-point type, ml_dtypes' included."""
    return bool(jnp.issubdtype(dtype, jnp.floating))


def is_integer(dtype: Any) -> bool:
    """Tell whether ``dtype`` is a signed or unsigned integer type, ml_dtypes' included."""
    return bool(jnp.issubdtype(dtype, jnp.integer))


def narrow(array: np.ndarray, what: str) -> np.ndarray:
    """Return an array in the dtype that JAX computes in; what does not fit is refused.

    Raises:
      ShapeError: an integer that 32 bit cannot hold, while JAX runs without 64 bit.
    """
    target = canonical(array.dtype)
    if target == array.dtype:
        return array
    if is_integer(target) and array.size:
        info = np.iinfo(target)
        low, high = int(array.min()), int(array.max())
        if low < info.min or high > info.max:
            raise ShapeError(
                f"{what} holds integers from {low} to {high}, and JAX computes {array.dtype} in "
                f"{target} now: run under jax.enable_x64(True)"
            )
    with np.errstate(all="ignore"):
        return array.astype(target)
