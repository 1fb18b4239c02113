"""Convolutions."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from fnml.core import ShapeError
from fnml.interop.onnx._dtypes import widest
from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._static import traced, where_is
from fnml.interop.onnx._windows import Windows, kernel_shape, windows

# The places of a kernel that are added up one by one on CPU.
_MOST_TAPS = 81


def _add_bias(y: Any, bias: Any) -> Any:
    return y if bias is None else y + bias.reshape((1, -1) + (1,) * (y.ndim - 2)).astype(y.dtype)


def _same_float(x: Any, weight: Any) -> tuple[Any, Any]:
    dtype = widest(x.dtype, weight.dtype)
    return x.astype(dtype), weight.astype(dtype)


def _conv(node: Node, x: Any, weight: Any, bias: Any = None) -> Any:
    x, weight, bias = traced(node, x, weight, bias)
    if weight.ndim != x.ndim or x.ndim < 2:
        raise ShapeError(f"{where_is(node)}: a weight of {list(weight.shape)} for {list(x.shape)}")
    slid = windows(node, x.shape[2:], kernel_shape(node, weight))
    groups = node.attributes.get("group", 1)
    x, weight = _same_float(x, weight)

    def convolve(x: Any, weight: Any) -> Any:
        return lax.conv_general_dilated(
            x,
            weight,
            slid.strides,
            slid.pads,
            rhs_dilation=slid.dilations,
            feature_group_count=groups,
        )

    depthwise = groups == x.shape[1] == weight.shape[0] and math.prod(slid.kernel) <= _MOST_TAPS
    pointwise = groups == 1 and math.prod(slid.kernel) == 1 and not np.any(slid.pads)
    if pointwise:
        y = lax.platform_dependent(
            x, weight, cpu=lambda x, weight: _by_product(x, weight, slid), default=convolve
        )
    elif groups > 1 and depthwise:
        y = lax.platform_dependent(
            x, weight, cpu=lambda x, weight: _by_taps(x, weight, slid), default=convolve
        )
    else:
        y = convolve(x, weight)
    return _add_bias(y, bias)


def _by_product(x: Any, weight: Any, slid: Windows) -> Any:
    """Convolve with a kernel of one place: on CPU twice as fast as XLA's convolution."""
    dtype = x.dtype
    strides = (1, 1, *slid.strides)
    x = lax.slice(x, (0,) * x.ndim, x.shape, strides) if max(strides) > 1 else x
    kernel = weight.reshape(1, *weight.shape[:2])
    y = jnp.matmul(kernel, x.reshape(*x.shape[:2], -1), preferred_element_type=_exact(dtype))
    return y.astype(dtype).reshape(x.shape[0], -1, *x.shape[2:])


def _exact(dtype: Any) -> Any:
    """Return the dtype to sum in: as within a convolution, only the sum is rounded."""
    return jnp.float32 if dtype.itemsize < 4 else dtype


def _by_taps(x: Any, weight: Any, slid: Windows) -> Any:
    """Convolve each channel by itself: XLA's loops on CPU are many times slower than this sum."""
    dtype = x.dtype
    x, weight = x.astype(_exact(dtype)), weight.astype(_exact(dtype))
    padded = lax.pad(
        x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *((*pad, 0) for pad in slid.pads)]
    )
    total: Any = 0
    for tap in np.ndindex(*slid.kernel):
        low = [t * d for t, d in zip(tap, slid.dilations, strict=True)]
        high = [
            a + (count - 1) * s + 1
            for a, s, count in zip(low, slid.strides, slid.counts, strict=True)
        ]
        seen = lax.slice(padded, (0, 0, *low), (*padded.shape[:2], *high), (1, 1, *slid.strides))
        total = total + seen * weight[(slice(None), 0, *tap)].reshape(
            (1, -1) + (1,) * len(slid.kernel)
        )
    return total.astype(dtype)


def _conv_transpose(node: Node, x: Any, weight: Any, bias: Any = None) -> Any:
    x, weight, bias = traced(node, x, weight, bias)
    attributes, rank = node.attributes, x.ndim - 2
    groups = attributes.get("group", 1)
    kernel = weight.shape[2:]
    strides = tuple(attributes.get("strides", (1,) * rank))
    dilations = tuple(attributes.get("dilations", (1,) * rank))
    extra = tuple(attributes.get("output_padding", (0,) * rank))
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = _transposed_pads(node, x.shape[2:], spans, strides, extra)
    # [C, M/g, ...] of g groups becomes [M, C/g, ...], turned around.
    split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    turned = jnp.swapaxes(split, 1, 2).reshape(-1, weight.shape[0] // groups, *kernel)
    turned = lax.rev(turned, range(2, turned.ndim))
    x, turned = _same_float(x, turned)
    y = lax.conv_general_dilated(
        x,
        turned,
        (1,) * rank,
        [
            (span - 1 - low, span - 1 - high + more)
            for span, (low, high), more in zip(spans, pads, extra, strict=True)
        ],
        lhs_dilation=strides,
        rhs_dilation=dilations,
        feature_group_count=groups,
    )
    return _add_bias(y, bias)


def _transposed_pads(
    node: Node,
    space: tuple[int, ...],
    spans: list[int],
    strides: tuple[int, ...],
    extra: tuple[int, ...],
) -> list[tuple[int, int]]:
    rank = len(space)
    auto = node.attributes.get("auto_pad", "NOTSET")
    sizes = node.attributes.get("output_shape")
    if not sizes and auto not in ("SAME_UPPER", "SAME_LOWER"):
        flat = [0] * 2 * rank if auto == "VALID" else node.attributes.get("pads", [0] * 2 * rank)
        return list(zip(flat[:rank], flat[rank:], strict=True))
    sizes = sizes or [size * stride for size, stride in zip(space, strides, strict=True)]
    pads = []
    for size, wanted, span, stride, more in zip(
        space, sizes[-rank:], spans, strides, extra, strict=True
    ):
        total = stride * (size - 1) + more + span - wanted
        half = total // 2 if auto == "SAME_UPPER" else total - total // 2
        pads.append((half, total - half))
    return pads


def _deform_conv(
    node: Node, x: Any, weight: Any, offset: Any, bias: Any = None, mask: Any = None
) -> Any:
    """Convolve what is read, by linear interpolation, beside each place of the kernel."""
    x, weight, offset, bias, mask = traced(node, x, weight, offset, bias, mask)
    batch, channels, *space = x.shape
    rank, groups = len(space), node.attributes.get("group", 1)
    slid = windows(node, tuple(space), kernel_shape(node, weight))
    parts = node.attributes.get("offset_group", 1)
    taps = np.indices(slid.kernel).reshape(rank, -1)
    offset = offset.reshape(batch, parts, taps.shape[1], rank, *slid.counts)
    rows = []
    for axis in range(rank):
        start = np.arange(slid.counts[axis]) * slid.strides[axis] - slid.pads[axis][0]
        start = start.reshape((-1,) + (1,) * (rank - 1 - axis))
        tap = taps[axis].reshape((-1,) + (1,) * rank) * slid.dilations[axis]
        base = np.broadcast_to(
            tap + start[None].reshape((1,) * (rank + 1 - start.ndim) + start.shape),
            (taps.shape[1], *slid.counts),
        )
        rows.append(offset[:, :, :, axis] + jnp.asarray(base, x.dtype)[None, None])
    split = x.reshape(batch, parts, channels // parts, -1)
    read = _interpolate(split, rows, tuple(space))
    if mask is not None:
        read = read * mask.reshape(batch, parts, 1, taps.shape[1], *slid.counts)
    read = read.reshape(batch, groups, channels // groups, taps.shape[1], *slid.counts)
    kernel = weight.reshape(groups, -1, channels // groups, taps.shape[1])
    y = jnp.einsum("bgct...,gmct->bgm...", read, kernel)
    return _add_bias(y.reshape(batch, -1, *slid.counts), bias)


def _interpolate(x: Any, rows: list[Any], space: tuple[int, ...]) -> Any:
    """Read ``x [B, P, C, space]`` at real places ``[B, P, T, counts]`` per axis; 0 outside."""
    lows = [jnp.floor(row) for row in rows]
    total: Any = 0
    for corner in np.ndindex(*(2,) * len(space)):
        weight: Any = 1
        flat: Any = 0
        for row, low, side, size in zip(rows, lows, corner, space, strict=True):
            place = low + side
            inside = (place >= 0) & (place <= size - 1)
            near = 1 - jnp.abs(row - place)
            weight = weight * jnp.where(inside, near, 0)
            flat = flat * size + jnp.clip(place, 0, size - 1).astype(jnp.int32)
        index = flat.reshape(*flat.shape[:2], 1, -1)
        read = jnp.take_along_axis(x, index, -1)
        total = total + read.reshape(*x.shape[:3], *flat.shape[2:]) * weight[:, :, None]
    return total


OPERATORS: Mapping[str, Operator] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DeformConv": _deform_conv,
}
