"""Resize and Upsample: every output element is a weighted sum of its neighbours, axis by axis."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from fnml.core import ConfigError
from fnml.interop.onnx._dtypes import is_float
from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._static import axis_of, checked, static, traced, where_is


class _Axis(NamedTuple):
    """How one axis is resized: lengths, scale, and the part of it that is shown."""

    before: int
    after: int
    scale: float
    start: float = 0.0
    end: float = 1.0


def _coordinates(node: Node, mode: str, axis: _Axis) -> np.ndarray:
    """Return where each output element lies on the input's axis, ``[after]``.

    In float32, as onnxruntime has it: which neighbour is nearest depends on the rounding.
    """
    scale, start, end = (np.float32(value) for value in axis[2:])
    x = np.arange(axis.after, dtype=np.float32)
    last = axis.before - 1
    if mode == "asymmetric":
        return x / scale
    if mode == "half_pixel" or (mode == "pytorch_half_pixel" and axis.after > 1):
        return (x + 0.5) / scale - 0.5
    if mode == "half_pixel_symmetric":
        adjustment = np.float32(axis.after) / (scale * axis.before)
        return axis.before / 2 * (1 - adjustment) + (x + 0.5) / scale - 0.5
    if mode == "tf_half_pixel_for_nn":
        return (x + 0.5) / scale
    if mode == "align_corners":
        return x * last / (axis.after - 1) if axis.after > 1 else x
    if mode == "tf_crop_and_resize":
        if axis.after == 1:
            return np.full(1, 0.5 * (start + end) * last, np.float32)
        return start * last + x * (end - start) * last / (axis.after - 1)
    if mode == "pytorch_half_pixel":
        return x * 0
    raise ConfigError(f"{where_is(node)}: no coordinate_transformation_mode {mode!r}")


_NEAREST: Mapping[str, Any] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _rounded(rounding: str, places: np.ndarray, axis: _Axis) -> np.ndarray:
    """Round to a pixel; before opset 11, onnxruntime rounds up where an axis shrinks."""
    if rounding == "simple":
        rounding = "ceil" if axis.scale < 1 else "floor"
    return _NEAREST[rounding](places)


def _linear_kernel(distance: np.ndarray) -> np.ndarray:
    return np.maximum(0, 1 - np.abs(distance))


def _cubic_kernel(distance: np.ndarray, a: float) -> np.ndarray:
    """Evaluate Keys' cubic convolution kernel (1981, equation 4) with its parameter ``a``."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _taps(node: Node, mode: str, x: np.ndarray, axis: _Axis) -> tuple[np.ndarray, np.ndarray]:
    """Return the neighbours of every output element and their weights, each ``[after, taps]``."""
    get = node.attributes.get
    shrink = min(1.0, axis.scale) if get("antialias", 0) else 1.0
    reach = math.ceil((1 if mode == "linear" else 2) / shrink)
    places = np.floor(x)[:, None] + np.arange(1 - reach, reach + 1)
    distance = (places - x[:, None]) * shrink
    if mode == "linear":
        weights = _linear_kernel(distance)
    else:
        weights = _cubic_kernel(distance, get("cubic_coeff_a", -0.75))
    if get("exclude_outside", 0):
        weights = np.where((places >= 0) & (places < axis.before), weights, 0)
    if get("exclude_outside", 0) or shrink < 1:
        weights = weights / weights.sum(axis=1, keepdims=True)
    return np.clip(places, 0, axis.before - 1).astype(np.int32), weights


def _interpolate(x: Any, places: np.ndarray, weights: np.ndarray, axis: int) -> Any:
    """Sum the neighbours along one axis.

    A few neighbours are gathered, so that an infinite one stays where it is; the many of a
    downscaling filter are a product with a matrix.
    """
    after, taps = places.shape
    if taps > 4:
        dense = np.zeros((after, x.shape[axis]))
        np.add.at(dense, (np.arange(after)[:, None], places), weights)
        matrix = jnp.asarray(dense.astype(x.dtype))
        moved = jnp.tensordot(x, matrix, ((axis,), (1,)), precision=lax.Precision.HIGHEST)
        return jnp.moveaxis(moved, -1, axis)
    spread = [-1 if a == axis else 1 for a in range(x.ndim)]
    total = None
    for tap in range(taps):
        if not weights[:, tap].any():
            continue
        weight = jnp.asarray(weights[:, tap].astype(x.dtype)).reshape(spread)
        term = jnp.take(x, places[:, tap], axis=axis, mode="clip") * weight
        total = term if total is None else total + term
    return total


def _targets(node: Node, x: Any, scales: Any, sizes: Any, axes: list[int]) -> list[_Axis]:
    """Work out the lengths and scales of the axes that are resized."""
    before = [x.shape[a] for a in axes]
    if scales is not None:
        values = np.asarray(scales, np.float32).ravel()
        # In float32, as the scales are: 0.7 * 10 is 7 there, and below 7 in float64.
        after = [int(np.floor(np.float32(n) * s)) for n, s in zip(before, values, strict=True)]
        return [_Axis(n, m, float(s)) for n, m, s in zip(before, after, values, strict=True)]
    wanted = [int(s) for s in np.ravel(sizes)]
    policy = node.attributes.get("keep_aspect_ratio_policy", "stretch")
    ratios = [m / n for n, m in zip(before, wanted, strict=True)]
    if policy == "stretch":
        return [_Axis(n, m, s) for n, m, s in zip(before, wanted, ratios, strict=True)]
    scale = min(ratios) if policy == "not_larger" else max(ratios)
    return [_Axis(n, math.floor(n * scale + 0.5), scale) for n in before]


def _cropped(targets: list[_Axis], roi: np.ndarray, from_scales: bool) -> list[_Axis]:
    """Put the regions of interest in; with scales, they decide the lengths too."""
    starts, ends = np.split(roi.astype(np.float64), 2)
    return [
        t._replace(
            start=float(a),
            end=float(b),
            after=int(np.floor(t.before * (b - a) * t.scale)) if from_scales else t.after,
        )
        for t, a, b in zip(targets, starts, ends, strict=True)
    ]


def _resample(
    node: Node, x: Any, targets: list[_Axis], axes: list[int], coordinate: str, rounding: str
) -> Any:
    """Resize ``x`` axis by axis; integers and half precision are interpolated in float32."""
    if coordinate != "tf_crop_and_resize" and all(t.before == t.after for t in targets):
        # Also where a scale is not quite 1, as in onnxruntime.
        return x
    mode = node.attributes.get("mode", "nearest")
    lengths = dict(enumerate(x.shape)) | {a: t.after for a, t in zip(axes, targets, strict=True)}
    checked(node, tuple(lengths.values()))
    out = x if mode == "nearest" or x.dtype == jnp.float64 else x.astype(jnp.float32)
    outside = []
    for axis, target in zip(axes, targets, strict=True):
        if target.before == target.after and (target.scale, target.start, target.end) == (1, 0, 1):
            continue
        places = _coordinates(node, coordinate, target)
        if coordinate == "tf_crop_and_resize":
            beyond = (places < 0) | (places > target.before - 1)
            outside.append(beyond.reshape([-1 if a == axis else 1 for a in range(x.ndim)]))
        if mode == "nearest":
            index = np.clip(_rounded(rounding, places, target), 0, target.before - 1)
            out = jnp.take(out, index.astype(np.int32), axis=axis, mode="clip")
        else:
            out = _interpolate(out, *_taps(node, mode, places, target), axis)
    fill = node.attributes.get("extrapolation_value", 0.0)
    for beyond in outside:
        out = jnp.where(beyond, jnp.asarray(fill, out.dtype), out)
    return out if mode == "nearest" else _stored(node, out, x.dtype)


def _stored(node: Node, x: Any, dtype: Any) -> Any:
    """Convert what was interpolated; integers as onnxruntime: plain linear ones are cut off."""
    if is_float(dtype):
        return x.astype(dtype)
    if node.attributes["mode"] == "cubic" or node.attributes.get("antialias", 0):
        info = jnp.iinfo(dtype)
        x = jnp.clip(jnp.round(x), float(info.min), float(info.max))
    return x.astype(dtype)


def _resize(node: Node, x: Any, roi: Any = None, scales: Any = None, sizes: Any = None) -> Any:
    if node.version < 11:
        return _upsample(node, x, roi)
    get = node.attributes.get
    axes = [axis_of(node, a, x.ndim) for a in get("axes") or range(x.ndim)]
    scales = None if scales is None else static(node, 2, scales)
    if scales is not None and scales.size == 0:
        scales = None
    sizes = None if scales is not None else static(node, 3, sizes)
    targets = _targets(node, x, scales, sizes, axes)
    coordinate = get("coordinate_transformation_mode", "half_pixel")
    if coordinate == "tf_crop_and_resize":
        targets = _cropped(targets, static(node, 1, roi).ravel(), scales is not None)
    (x,) = traced(node, x)
    rounding = get("nearest_mode", "round_prefer_floor")
    return _resample(node, x, targets, axes, coordinate, rounding)


def _upsample(node: Node, x: Any, scales: Any = None) -> Any:
    get = node.attributes.get
    if scales is not None:
        values = static(node, 1, scales)
    elif "scales" in node.attributes:
        values = np.asarray(node.attributes["scales"], np.float32)
    else:
        values = np.asarray([1, 1, get("height_scale"), get("width_scale")], np.float32)
    axes = list(range(x.ndim))
    targets = _targets(node, x, values, None, axes)
    node = node._replace(attributes={"mode": get("mode", "nearest").replace("bilinear", "linear")})
    (x,) = traced(node, x)
    return _resample(node, x, targets, axes, "asymmetric", "simple")


OPERATORS: Mapping[str, Operator] = {"Resize": _resize, "Upsample": _upsample}

SHAPE_INPUTS: Mapping[str, tuple[int, ...]] = {"Resize": (1, 2, 3), "Upsample": (1,)}
