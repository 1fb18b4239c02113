"""Operators of ai.onnx.ml on features and labels, and linear regression."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._static import static, traced


def _softmax_zero(x: Any) -> Any:
    """Return softmax over the scores that are not zero; those stay zero."""
    some = x != 0
    weights = jnp.where(some, jnp.exp(x - x.max(-1, keepdims=True)), 0)
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)


POST_TRANSFORMS: Mapping[str, Callable[[Any], Any]] = {
    "NONE": lambda x: x,
    "SOFTMAX": jax.nn.softmax,
    "LOGISTIC": jax.nn.sigmoid,
    "SOFTMAX_ZERO": _softmax_zero,
    "PROBIT": ndtri,
}


def _array_feature_extractor(node: Node, x: Any, indices: Any) -> Any:
    x, indices = traced(node, x, indices)
    picked = jnp.take(x, indices.reshape(-1), axis=-1)
    return picked[None] if x.ndim == 1 else picked


def _binarizer(node: Node, x: Any) -> Any:
    (x,) = traced(node, x)
    return (x > node.attributes.get("threshold", 0.0)).astype(x.dtype)


def _scaler(node: Node, x: Any) -> Any:
    (x,) = traced(node, x)
    offset, scale = (
        jnp.asarray(np.array(node.attributes[name], np.float32)) for name in ("offset", "scale")
    )
    spread = (1,) * (x.ndim - 1) + (-1,)
    return (x.astype(jnp.float32) - offset.reshape(spread)) * scale.reshape(spread)


def _normalizer(node: Node, x: Any) -> Any:
    (x,) = traced(node, x)
    x = x.astype(jnp.float32)
    norm = {
        "MAX": lambda v: v.max(-1, keepdims=True),
        "L1": lambda v: jnp.abs(v).sum(-1, keepdims=True),
        "L2": lambda v: jnp.linalg.norm(v, axis=-1, keepdims=True),
    }[node.attributes.get("norm", "MAX")](x)
    return x / jnp.where(norm == 0, 1, norm)


def _linear_regressor(node: Node, x: Any) -> Any:
    (x,) = traced(node, x)
    get = node.attributes.get
    weights = np.array(get("coefficients"), np.float32).reshape(get("targets", 1), -1)
    bias = np.array(get("intercepts") or [0.0] * len(weights), np.float32)[None]
    y = jnp.matmul(x.astype(jnp.float32), jnp.asarray(weights.T)) + jnp.asarray(bias)
    return POST_TRANSFORMS[get("post_transform", "NONE")](y)


def _table(node: Node, kind: str) -> np.ndarray:
    """Return a LabelEncoder's keys or values, whichever attribute has them."""
    get: Any = node.attributes.get
    if get(f"{kind}_tensor") is not None:
        return get(f"{kind}_tensor")
    for name, dtype in (("strings", object), ("int64s", np.int64), ("floats", np.float32)):
        if get(f"{kind}_{name}") is not None:
            return np.array(get(f"{kind}_{name}"), dtype)
    return np.array(get("classes_strings"), object)


def _label_encoder(node: Node, x: Any) -> Any:
    get = node.attributes.get
    if "classes_strings" in node.attributes:
        words = _table(node, "classes")
        forward = isinstance(x, np.ndarray) and x.dtype.kind in "OSU"
        numbers = np.arange(len(words), dtype=np.int64)
        keys, values = (words, numbers) if forward else (numbers, words)
    else:
        keys, values = _table(node, "keys"), _table(node, "values")
    default = get("default_tensor")
    if default is None:
        default = {
            "O": get("default_string", "_Unused"),
            "i": get("default_int64", -1),
            "f": get("default_float", -0.0),
        }[values.dtype.kind]
    else:
        default = np.ravel(default)[0]
    if "O" in (keys.dtype.kind, values.dtype.kind):
        found = dict(zip(keys.tolist(), values.tolist(), strict=True))
        known = static(node, 0, x)
        out = np.empty(known.shape, values.dtype)
        out.reshape(-1)[:] = [found.get(k, default) for k in known.reshape(-1).tolist()]
        return out
    x, names = traced(node, x, keys)
    names = names.astype(x.dtype).reshape((1,) * x.ndim + (-1,))
    hit = x[..., None] == names
    if keys.dtype.kind == "f":
        hit |= jnp.isnan(x)[..., None] & jnp.isnan(names)
    # The last of equal keys counts.
    place = len(keys) - 1 - jnp.argmax(jnp.flip(hit, -1), axis=-1)
    (table,) = traced(node, values)
    return jnp.where(hit.any(-1), table[place], jnp.asarray(default, table.dtype))


OPERATORS: Mapping[str, Operator] = {
    "ai.onnx.ml.ArrayFeatureExtractor": _array_feature_extractor,
    "ai.onnx.ml.Binarizer": _binarizer,
    "ai.onnx.ml.LabelEncoder": _label_encoder,
    "ai.onnx.ml.LinearRegressor": _linear_regressor,
    "ai.onnx.ml.Normalizer": _normalizer,
    "ai.onnx.ml.Scaler": _scaler,
}
