"""Regions of interest: RoiAlign, MaxRoiPool, NonMaxSuppression."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._static import static, traced


def _bin_points(node: Node, start: Any, length: Any, bins: int, ratio: Any) -> tuple[Any, Any]:
    """Return the places of the samples in each bin ``[R, bins, S]``, and which count ``[R, S]``.

    Args:
      node: the node.
      start: ``[R]``, where the regions start.
      length: ``[R]``, how long they are.
      bins: into how many bins each is divided.
      ratio: samples per bin, ``[R]``; NumPy, for its largest is a shape.
    """
    samples = np.arange(int(ratio.max(initial=1)))
    size = (length / bins)[:, None, None]
    counts = jnp.asarray(ratio, start.dtype)[:, None, None]
    within = (jnp.asarray(samples, start.dtype) + 0.5)[None, None] / counts
    whole = jnp.arange(bins, dtype=start.dtype)[None, :, None]
    return start[:, None, None] + (whole + within) * size, samples[None] < ratio[:, None]


def _neighbours(place: Any, size: int) -> list[tuple[Any, Any]]:
    """Return the two neighbours of each place, and weights: 0 more than a pixel outside."""
    counts = (place >= -1) & (place <= size)
    inside = jnp.clip(place, 0, size - 1)
    low = jnp.minimum(jnp.floor(inside), max(size - 2, 0))
    t = inside - low
    index = low.astype(jnp.int32)
    return [
        (index, jnp.where(counts, 1 - t, 0)),
        (jnp.minimum(index + 1, size - 1), jnp.where(counts, t, 0)),
    ]


def _roi_align(node: Node, x: Any, rois: Any, batch: Any) -> Any:
    get = node.attributes.get
    bins = get("output_height", 1), get("output_width", 1)
    ratio = get("sampling_ratio", 0)
    # Where the number of samples depends on the regions, these have to be known.
    known = None if ratio > 0 else static(node, 1, rois).astype(np.float64)
    x, rois, batch = traced(node, x, rois, batch)
    half = (
        node.version >= 16 and get("coordinate_transformation_mode", "half_pixel") == "half_pixel"
    )
    scale, shift = get("spatial_scale", 1.0), 0.5 if half else 0.0
    axes, valid = [], []
    for first, size, n in ((1, x.shape[2], bins[0]), (0, x.shape[3], bins[1])):
        start = rois[:, first] * scale - shift
        length = (rois[:, first + 2] - rois[:, first]) * scale
        counts = np.full(rois.shape[0], ratio)
        if known is not None:
            extent = (known[:, first + 2] - known[:, first]) * scale
            counts = np.ceil((extent if half else np.maximum(extent, 1)) / n).astype(int)
        length = length if half else jnp.maximum(length, 1)
        places, counted = _bin_points(node, start, length, n, np.maximum(counts, 1))
        axes.append(_neighbours(places, size))
        valid.append(jnp.asarray(counted))
    image = batch[:, None, None, None, None]
    corners = []
    for row, row_weight in axes[0]:
        for column, column_weight in axes[1]:
            # [R, bins, S, bins, S, C]: the channel comes last, the advanced indices first.
            y, z = row[:, :, :, None, None], column[:, None, None]
            weight = row_weight[:, :, :, None, None] * column_weight[:, None, None]
            corners.append(x[image, :, y, z] * weight[..., None])
    counted = (valid[0][:, None, :, None, None] & valid[1][:, None, None, None, :])[..., None]
    if get("mode", "avg") == "avg":
        total = jnp.where(counted, sum(corners), 0).sum((2, 4))
        return (total / counted.sum((2, 4)).astype(x.dtype)).transpose(0, 3, 1, 2)
    # The largest weighted neighbour, not the largest interpolated value.
    best = jnp.stack(corners).max(0)
    return jnp.where(counted, best, -jnp.inf).max((2, 4)).transpose(0, 3, 1, 2)


def _max_roi_pool(node: Node, x: Any, rois: Any) -> Any:
    x, rois = traced(node, x, rois)
    scale = node.attributes.get("spatial_scale", 1.0)
    bins = node.attributes["pooled_shape"]

    def members(low: Any, high: Any, n: int, size: int) -> Any:
        """Tell which pixels lie in which bin: ``[n, size]``."""
        length = jnp.maximum(high - low + 1, 1)
        step = jnp.arange(n + 1, dtype=rois.dtype) * (length / n)
        starts, ends = jnp.floor(step[:-1]) + low, jnp.ceil(step[1:]) + low
        pixel = jnp.arange(size, dtype=rois.dtype)[None]
        return (pixel >= starts[:, None]) & (pixel < ends[:, None])

    def one(roi: Any) -> Any:
        image = x[roi[0].astype(jnp.int32)]
        left, top, right, bottom = jnp.round(roi[1:] * scale)
        rows = members(top, bottom, bins[0], x.shape[2])
        columns = members(left, right, bins[1], x.shape[3])
        wide = jnp.where(columns[None, None], image[:, :, None], -jnp.inf).max(-1)
        best = jnp.where(rows[None, :, :, None], wide[:, None], -jnp.inf).max(2)
        return jnp.where(jnp.isneginf(best), 0, best).astype(x.dtype)

    return lax.map(one, rois)


def _overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return intersection over union of ``[4]`` with ``[K, 4]``, corners in order."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=1)
    area = np.prod(box[2:] - box[:2]), np.prod(others[:, 2:] - others[:, :2], axis=1)
    union = area[0] + area[1] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _corners(boxes: np.ndarray, centred: bool) -> np.ndarray:
    """Return boxes ``[..., 4]`` as two corners, the smaller first."""
    if centred:
        middle, size = boxes[..., :2], boxes[..., 2:]
        return np.concatenate([middle - size / 2, middle + size / 2], axis=-1)
    pairs = boxes[..., :2], boxes[..., 2:]
    return np.concatenate([np.minimum(*pairs), np.maximum(*pairs)], axis=-1)


def _non_max_suppression(
    node: Node,
    boxes: Any,
    scores: Any,
    most: Any = None,
    overlap: Any = None,
    least: Any = None,
) -> np.ndarray:
    """Choose the best boxes; how many is data, so everything has to be known."""
    boxes, scores = static(node, 0, boxes), static(node, 1, scores)
    limit = 0 if most is None else int(static(node, 2, most).ravel()[0])
    threshold = 0.0 if overlap is None else float(static(node, 3, overlap).ravel()[0])
    floor = -math.inf if least is None else float(static(node, 4, least).ravel()[0])
    boxes = _corners(boxes, bool(node.attributes.get("center_point_box", 0)))
    chosen = []
    for batch, kind in np.ndindex(*scores.shape[:2]):
        order = np.argsort(-scores[batch, kind], kind="stable")
        order = order[scores[batch, kind][order] > floor]
        kept = 0
        while order.size and kept < limit:
            chosen.append((batch, kind, order[0]))
            kept += 1
            suppressed = _overlap(boxes[batch, order[0]], boxes[batch, order[1:]]) > threshold
            order = order[1:][~suppressed]
    return np.array(chosen, np.int64).reshape(-1, 3)


OPERATORS: Mapping[str, Operator] = {
    "MaxRoiPool": _max_roi_pool,
    "NonMaxSuppression": _non_max_suppression,
    "RoiAlign": _roi_align,
}

SHAPE_INPUTS: Mapping[str, tuple[int, ...]] = {"NonMaxSuppression": (0, 1, 2, 3, 4)}
