"""Quantized arithmetic: conversions to and from integers with a scale, and products of integers."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax

from fnml.interop.onnx._dtypes import DTYPES, is_float
from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._ops_cast import convert
from fnml.interop.onnx._static import axis_of, traced


def _spread(node: Node, scale: Any, x: Any) -> Any:
    """Lay a scale or zero point out so that it broadcasts against ``x``.

    A single value is for the whole tensor, a vector for one axis; one of the tensor's rank holds a
    value per block along ``axis``.
    """
    if scale is None or scale.ndim == 0 or (scale.ndim == 1 and scale.size == 1 and x.ndim != 1):
        return None if scale is None else scale.reshape((1,) * x.ndim)
    axis = axis_of(node, node.attributes.get("axis", 1), x.ndim) if x.ndim > 1 else 0
    if scale.ndim == 1:
        return scale.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    size = x.shape[axis]
    block = node.attributes.get("block_size", 0) or -(-size // scale.shape[axis])
    return lax.slice_in_dim(jnp.repeat(scale, block, axis=axis), 0, size, axis=axis)


def _divide(x: Any, scale: Any) -> Any:
    """Divide exactly: by one shared divisor, XLA would multiply with its rounded reciprocal.

    A quotient that should be a half of an odd number would round to the wrong side.
    """
    return x / lax.optimization_barrier(jnp.broadcast_to(scale, x.shape))


def _to_integer(scaled: Any, zero_point: Any, dtype: Any) -> Any:
    """Round half to even, add the zero point, saturate."""
    info = jnp.iinfo(dtype)
    wide = scaled if scaled.dtype == jnp.float64 else scaled.astype(jnp.float32)
    # Clipped before and after: the sum of two 16-bit numbers fits 32 bits.
    rounded = jnp.clip(jnp.round(wide), -(2.0**20), 2.0**20).astype(jnp.int32)
    if zero_point is not None:
        rounded = rounded + zero_point.astype(jnp.int32)
    return jnp.clip(rounded, int(info.min), int(info.max)).astype(dtype)


def _quantize(node: Node, x: Any, scale: Any, zero_point: Any = None) -> Any:
    x, scale, zero_point = traced(node, x, scale, zero_point)
    given = node.attributes.get("output_dtype", 0)
    dtype = DTYPES[given or 2] if zero_point is None else zero_point.dtype
    precision = node.attributes.get("precision", 0)
    exact = DTYPES[precision] if precision else scale.dtype
    scale, zero_point = _spread(node, scale, x), _spread(node, zero_point, x)
    scaled = _divide(x.astype(exact), scale.astype(exact))
    if not is_float(dtype):
        return _to_integer(scaled, zero_point, dtype)
    if zero_point is not None:
        scaled = scaled + zero_point.astype(exact)
    return convert(scaled, dtype, bool(node.attributes.get("saturate", 1)))


def _dequantize(node: Node, x: Any, scale: Any, zero_point: Any = None) -> Any:
    x, scale, zero_point = traced(node, x, scale, zero_point)
    given = node.attributes.get("output_dtype", 0)
    dtype = DTYPES[given] if given else scale.dtype
    scale, zero_point = _spread(node, scale, x), _spread(node, zero_point, x)
    if not is_float(x.dtype):
        x = x.astype(jnp.int32)
        if zero_point is not None:
            x = x - zero_point.astype(jnp.int32)
    elif zero_point is not None:
        x = x.astype(dtype) - zero_point.astype(dtype)
    return x.astype(dtype) * scale.astype(dtype)


def _dynamic_quantize(node: Node, x: Any) -> tuple[Any, Any, Any]:
    (x,) = traced(node, x)
    low, high = jnp.minimum(x.min(), 0), jnp.maximum(x.max(), 0)
    scale = _divide(high - low, jnp.asarray(255, x.dtype))
    # A tensor of zeros has no range: any scale represents it.
    scale = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    zero_point = jnp.clip(jnp.round(_divide(-low, scale)), 0, 255).astype(jnp.uint8)
    spread = (1,) * x.ndim
    y = _to_integer(_divide(x, scale.reshape(spread)), zero_point.reshape(spread), jnp.uint8)
    return y, scale, zero_point


def _centred(x: Any, zero_point: Any) -> Any:
    """Subtract a zero point that broadcasts, in 32 bits."""
    x = x.astype(jnp.int32)
    return x if zero_point is None else x - zero_point.astype(jnp.int32)


def _along(value: Any, rank: int, axis: int) -> Any:
    """Give a per-tensor or per-row value the rank of its matrix; a vector lies along ``axis``."""
    if value is None or value.ndim == rank:
        return value
    if value.size == 1:
        return value.reshape((1,) * rank)
    return value.reshape([-1 if a == axis % rank else 1 for a in range(rank)])


def _matmul_integer(node: Node, a: Any, b: Any, a_zero: Any = None, b_zero: Any = None) -> Any:
    a, b, a_zero, b_zero = traced(node, a, b, a_zero, b_zero)
    return jnp.matmul(
        _centred(a, _along(a_zero, a.ndim, -2)), _centred(b, _along(b_zero, b.ndim, -1))
    )


def _qlinear_matmul(
    node: Node,
    a: Any,
    a_scale: Any,
    a_zero: Any,
    b: Any,
    b_scale: Any,
    b_zero: Any,
    y_scale: Any,
    y_zero: Any,
) -> Any:
    values = traced(node, a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero)
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = values
    a_scale, a_zero = _along(a_scale, a.ndim, -2), _along(a_zero, a.ndim, -2)
    b_scale, b_zero = _along(b_scale, b.ndim, -1), _along(b_zero, b.ndim, -1)
    total = jnp.matmul(_centred(a, a_zero), _centred(b, b_zero))
    rank = total.ndim
    # One operand may have fewer dimensions, in front of which the product broadcasts.
    left, right = (
        s.astype(jnp.float32).reshape((1,) * (rank - s.ndim) + s.shape) for s in (a_scale, b_scale)
    )
    out = _along(y_scale, rank, -2).astype(jnp.float32)
    return _to_integer(
        total.astype(jnp.float32) * (left * right / out), _along(y_zero, rank, -2), y_zero.dtype
    )


def _padding(node: Node, spatial: tuple[int, ...], kernel: tuple[int, ...]) -> Any:
    """Return what ``lax`` takes as padding from ``auto_pad`` and ``pads``."""
    auto = node.attributes.get("auto_pad", "NOTSET")
    rank = len(spatial)
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        return "SAME" if auto == "SAME_UPPER" else "SAME_LOWER"
    pads = node.attributes.get("pads") or [0] * (2 * rank)
    return [(0, 0)] * rank if auto == "VALID" else list(zip(pads[:rank], pads[rank:], strict=True))


def _integer_conv(node: Node, x: Any, w: Any, x_zero: Any, w_zero: Any) -> Any:
    """Convolve integers, ``[B, C, ...]`` with ``[M, C/g, ...]``, into int32."""
    rank = x.ndim - 2
    x = _centred(x, _along(x_zero, x.ndim, 1))
    w = _centred(w, _along(w_zero, w.ndim, 0))
    return lax.conv_general_dilated(
        x,
        w,
        window_strides=node.attributes.get("strides") or [1] * rank,
        padding=_padding(node, x.shape[2:], w.shape[2:]),
        rhs_dilation=node.attributes.get("dilations") or [1] * rank,
        feature_group_count=node.attributes.get("group", 1),
        preferred_element_type=jnp.int32,
    )


def _conv_integer(node: Node, x: Any, w: Any, x_zero: Any = None, w_zero: Any = None) -> Any:
    return _integer_conv(node, *traced(node, x, w, x_zero, w_zero))


def _qlinear_conv(
    node: Node,
    x: Any,
    x_scale: Any,
    x_zero: Any,
    w: Any,
    w_scale: Any,
    w_zero: Any,
    y_scale: Any,
    y_zero: Any,
    bias: Any = None,
) -> Any:
    values = traced(node, x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, bias)
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, bias = values
    total = _integer_conv(node, x, w, x_zero, w_zero)
    if bias is not None:
        total = total + _along(bias, x.ndim, 1)
    scale = _along(x_scale, x.ndim, 1) * _along(w_scale, x.ndim, 1) / _along(y_scale, x.ndim, 1)
    return _to_integer(total.astype(scale.dtype) * scale, _along(y_zero, x.ndim, 1), y_zero.dtype)


OPERATORS: Mapping[str, Operator] = {
    "ConvInteger": _conv_integer,
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "MatMulInteger": _matmul_integer,
    "QLinearConv": _qlinear_conv,
    "QLinearMatMul": _qlinear_matmul,
    "QuantizeLinear": _quantize,
}
