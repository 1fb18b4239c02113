"""Conversions between element types: Cast, CastLike, BitCast."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from fnml.interop.onnx._dtypes import DTYPES, canonical, is_float, is_integer
from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._static import is_symbolic

_FLOAT8 = {DTYPES[code] for code in (17, 18, 19, 20)}
_E8M0 = DTYPES[24]
_NARROW = {DTYPES[code] for code in (21, 22, 25, 26)}
_TEXT = DTYPES[8]


def convert(x: Any, dtype: Any, saturate: bool = True, round_mode: str = "up") -> Any:
    """Convert by ONNX's rules; a NumPy array stays one, so that shape arithmetic folds.

    Args:
      x: an array, or a NumPy array of strings.
      dtype: the dtype to convert to; ``object`` means strings.
      saturate: out-of-range values become the largest float8, instead of infinity or NaN.
      round_mode: ``up``, ``down`` or ``nearest``, for float8_e8m0fnu.

    >>> convert(np.array([1e9, -3.0], np.float32), ml_dtypes.float8_e4m3fn).tolist()
    [448.0, -3.0]
    """
    dtype = np.dtype(dtype)
    if is_symbolic(x):
        if is_integer(dtype):
            return x
        x = jnp.stack([jnp.asarray(size) for size in x.flat]).reshape(x.shape)
    known = isinstance(x, np.ndarray)
    xp = np if known else jnp
    if known and dtype == _TEXT:
        return _to_text(x)
    if known and x.dtype.kind in "OSU":
        x = _from_text(x, dtype)
    if x.dtype == dtype:
        return x
    with np.errstate(all="ignore"):
        if dtype == _E8M0:
            return _to_e8m0(xp, x.astype(np.float32), saturate, round_mode)
        if saturate and dtype in _FLOAT8:
            x = _clip_to(xp, x, dtype)
        if dtype in _NARROW and is_float(x.dtype):
            # Above a byte's bounds the low bits remain, as NumPy has it; XLA would clip.
            x = x.astype(np.int32)
        return x.astype(dtype if known else canonical(dtype))


def _clip_to(xp: Any, x: Any, dtype: np.dtype) -> Any:
    """Clip to a float8's finite range, in a type that holds its bounds; NaN stays NaN."""
    wide = x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)
    largest = wide.dtype.type(ml_dtypes.finfo(dtype).max)
    return xp.clip(wide, -largest, largest)


def _to_e8m0(xp: Any, x: Any, saturate: bool, round_mode: str) -> Any:
    """Keep a float32's exponent, rounded by the fraction; the sign is dropped, NaN is 255."""
    words = x.view(np.uint32) if xp is np else lax.bitcast_convert_type(x, jnp.uint32)
    exponent = ((words >> np.uint32(23)) & np.uint32(0xFF)).astype(np.int32)
    fraction = (words & np.uint32(0x7FFFFF)).astype(np.int32)
    # 2**-127, the smallest e8m0, is a float32 subnormal whose fraction is one half.
    rest = xp.where(exponent == 0, fraction - 0x400000, fraction)
    half = xp.where(exponent == 0, 0x200000, 0x400000)
    up = {"up": rest > 0, "down": rest > 0x7FFFFF, "nearest": rest >= half}[round_mode]
    value = exponent + up.astype(np.int32)
    value = xp.where(value >= 255, 254 if saturate else 255, value)
    value = xp.where((exponent == 0) & (rest < 0), 0 if saturate else 255, value)
    value = xp.where((exponent == 255) & (fraction != 0), 255, value).astype(np.uint8)
    return value.view(_E8M0) if xp is np else lax.bitcast_convert_type(value, _E8M0)


def _from_text(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Parse strings as numbers; ``inf`` and ``nan`` in any case."""
    texts = [str(s).strip() for s in x.ravel()]
    if is_integer(dtype):
        whole = [int(s) if s.lstrip("+-").isdigit() else int(float(s)) for s in texts]
        return np.array(whole, dtype).reshape(x.shape)
    return np.array([float(s) for s in texts], np.float64).reshape(x.shape)


def _to_text(x: np.ndarray) -> np.ndarray:
    """Write numbers as strings, a float with the digits that tell it from its neighbours."""
    plain = x if x.dtype.kind in "OSUbiuf" else x.astype(np.float32)
    out = np.empty(x.shape, object)
    out.ravel()[:] = [str(v) for v in plain.ravel()]
    return out


def _cast_to(node: Node, x: Any, dtype: np.dtype) -> Any:
    saturate = bool(node.attributes.get("saturate", 1))
    return convert(x, dtype, saturate, node.attributes.get("round_mode", "up"))


def _cast(node: Node, x: Any) -> Any:
    to = node.attributes["to"]
    # Opset 1 names the type.
    return _cast_to(node, x, np.dtype(to.lower()) if isinstance(to, str) else DTYPES[to])


def _cast_like(node: Node, x: Any, target: Any) -> Any:
    return _cast_to(node, x, np.dtype(target.dtype))


def _bit_cast(node: Node, x: Any) -> Any:
    dtype = DTYPES[node.attributes["to"]]
    if isinstance(x, np.ndarray):
        return _numpy_bits(x, dtype)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if dtype == np.bool_:
        return lax.bitcast_convert_type(x, jnp.uint8).astype(jnp.bool_)
    return lax.bitcast_convert_type(x, dtype)


def _numpy_bits(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Reinterpret; types below a byte lie in one each, whose upper bits carry the sign."""
    if x.dtype not in _NARROW or is_float(dtype):
        return x.view(dtype)
    bits = int(x.dtype.name[-1])
    values = x.astype(np.int8) & np.int8(2**bits - 1)
    if not dtype.name.startswith("u"):
        values = np.where(values >= 2 ** (bits - 1), values - np.int8(2**bits), values)
    return values.astype(dtype)


OPERATORS: Mapping[str, Operator] = {"BitCast": _bit_cast, "Cast": _cast, "CastLike": _cast_like}
