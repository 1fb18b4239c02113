"""Normalisation, and dropout."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnml.interop.onnx._dtypes import DTYPES
from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._static import align, axis_of, static, traced


def _channels(values: Any, rank: int) -> Any:
    """Lay ``[C]`` out against ``[B, C, ...]``."""
    return values.reshape((1, -1) + (1,) * (rank - 2))


def _batch_normalization(
    node: Node, x: Any, scale: Any, bias: Any, mean: Any, variance: Any
) -> Any:
    x, scale, bias, mean, variance = traced(node, x, scale, bias, mean, variance)
    attributes = node.attributes
    epsilon = attributes.get("epsilon", 1e-5)
    if node.version < 9 and not attributes.get("spatial", 1):
        return (x - mean) * lax.rsqrt(variance + epsilon) * scale + bias
    if not attributes.get("training_mode", 0):
        rate = lax.rsqrt(variance.astype(x.dtype) + epsilon) * scale.astype(x.dtype)
        shift = bias.astype(x.dtype) - mean.astype(x.dtype) * rate
        return x * _channels(rate, x.ndim) + _channels(shift, x.ndim)
    axes = tuple(i for i in range(x.ndim) if i != 1)
    now, spread = x.mean(axes), x.var(axes)
    rate = lax.rsqrt(spread + epsilon)
    normal = (x - _channels(now, x.ndim)) * _channels(rate, x.ndim)
    keep = attributes.get("momentum", 0.9)
    return (
        normal * _channels(scale, x.ndim).astype(x.dtype) + _channels(bias, x.ndim).astype(x.dtype),
        mean * keep + now.astype(mean.dtype) * (1 - keep),
        variance * keep + spread.astype(variance.dtype) * (1 - keep),
    )


def standardize(x: Any, axes: tuple[int, ...], epsilon: float) -> tuple[Any, Any, Any]:
    """Return ``x`` with mean 0 and variance 1 over axes, the mean, and 1 / the deviation."""
    mean = x.mean(axes, keepdims=True)
    centred = x - mean
    rate = lax.rsqrt((centred * centred).mean(axes, keepdims=True) + epsilon)
    return centred * rate, mean, rate


def _instance_normalization(node: Node, x: Any, scale: Any, bias: Any) -> Any:
    x, scale, bias = traced(node, x, scale, bias)
    axes = tuple(range(2, x.ndim))
    normal, _, _ = standardize(x, axes, node.attributes.get("epsilon", 1e-5))
    return normal * _channels(scale, x.ndim) + _channels(bias, x.ndim)


def _layer_normalization(node: Node, x: Any, scale: Any, bias: Any = None) -> Any:
    x, scale, bias = traced(node, x, scale, bias)
    first = axis_of(node, node.attributes.get("axis", -1), x.ndim)
    stash = DTYPES[node.attributes.get("stash_type", 1)]
    wide = x.astype(stash)
    axes = tuple(range(first, x.ndim))
    normal, mean, rate = standardize(wide, axes, node.attributes.get("epsilon", 1e-5))
    y, scale, bias = align(node, normal.astype(x.dtype), scale, bias)
    y = y * scale if bias is None else y * scale + bias
    return y.astype(x.dtype), mean, rate


def _group_normalization(node: Node, x: Any, scale: Any, bias: Any) -> Any:
    x, scale, bias = traced(node, x, scale, bias)
    groups = node.attributes["num_groups"]
    stash = DTYPES[node.attributes.get("stash_type", 1)] if node.version >= 21 else x.dtype
    split = x.reshape(x.shape[0], groups, -1).astype(stash)
    normal, _, _ = standardize(split, (2,), node.attributes.get("epsilon", 1e-5))
    normal = normal.astype(x.dtype)
    if node.version < 21:
        return (normal * scale[None, :, None] + bias[None, :, None]).reshape(x.shape)
    return normal.reshape(x.shape) * _channels(scale, x.ndim) + _channels(bias, x.ndim)


def _mean_variance_normalization(node: Node, x: Any) -> Any:
    (x,) = traced(node, x)
    axes = tuple(axis_of(node, a, x.ndim) for a in node.attributes.get("axes", (0, 2, 3)))
    mean = x.mean(axes, keepdims=True)
    deviation = jnp.sqrt((x * x).mean(axes, keepdims=True) - mean * mean)
    return (x - mean) / (deviation + 1e-9)


def _lp_normalization(node: Node, x: Any) -> Any:
    (x,) = traced(node, x)
    axis = axis_of(node, node.attributes.get("axis", -1), x.ndim)
    if node.attributes.get("p", 2) == 1:
        norm = jnp.abs(x).sum(axis, keepdims=True)
    else:
        norm = jnp.sqrt((x * x).sum(axis, keepdims=True))
    zero = norm == 0
    return jnp.where(zero, 0, x / jnp.where(zero, 1, norm))


def _lrn(node: Node, x: Any) -> Any:
    (x,) = traced(node, x)
    size = node.attributes["size"]
    alpha, beta = node.attributes.get("alpha", 1e-4), node.attributes.get("beta", 0.75)
    low = (size - 1) // 2
    window = (1, size) + (1,) * (x.ndim - 2)
    edges = [(0, 0), (low, size - 1 - low)] + [(0, 0)] * (x.ndim - 2)
    total = lax.reduce_window(x * x, np.zeros((), x.dtype), lax.add, window, (1,) * x.ndim, edges)
    return x / (node.attributes.get("bias", 1.0) + alpha / size * total) ** beta


def _dropout(node: Node, x: Any, ratio: Any = None, training: Any = None) -> Any:
    if node.version < 12:
        return x, np.ones(x.shape, bool if node.version >= 10 else np.float32)
    rate = 0.5 if ratio is None else float(static(node, 1, ratio))
    if training is None or not bool(static(node, 2, training)) or rate == 0:
        return x, np.ones(x.shape, bool)
    (x,) = traced(node, x)
    kept = jax.random.bernoulli(node.outer.key(), 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0), kept


OPERATORS: Mapping[str, Operator] = {
    "BatchNormalization": _batch_normalization,
    "Dropout": _dropout,
    "GroupNormalization": _group_normalization,
    "InstanceNormalization": _instance_normalization,
    "LRN": _lrn,
    "LayerNormalization": _layer_normalization,
    "LpNormalization": _lp_normalization,
    "MeanVarianceNormalization": _mean_variance_normalization,
}
SHAPE_INPUTS = {"Dropout": (1, 2)}
