"""Random draws: the same key, or the same ``seed`` attribute, gives the same numbers.

A node with a ``seed`` draws the same numbers in every call; one without takes its key from the
caller of ``apply``, folded with the node's name.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fnml.interop.onnx._dtypes import DTYPES, canonical
from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._static import checked, traced


def _key(node: Node) -> jax.Array:
    seed = node.attributes.get("seed")
    if seed is None:
        return node.outer.key()
    # The seed is a float: its bits are a number.
    return jax.random.key(int(np.float32(seed).view(np.uint32)))


def _dtype(node: Node, default: Any) -> np.dtype[Any]:
    code = node.attributes.get("dtype")
    return canonical(default if code is None else DTYPES[code])


def _normal(node: Node, shape: tuple[int, ...], default: Any) -> Any:
    scale, mean = node.attributes.get("scale", 1.0), node.attributes.get("mean", 0.0)
    return jax.random.normal(_key(node), shape, _dtype(node, default)) * scale + mean


def _uniform(node: Node, shape: tuple[int, ...], default: Any) -> Any:
    low, high = node.attributes.get("low", 0.0), node.attributes.get("high", 1.0)
    return jax.random.uniform(_key(node), shape, _dtype(node, default)) * (high - low) + low


def _random_normal(node: Node) -> Any:
    return _normal(node, checked(node, node.attributes["shape"]), np.float32)


def _random_normal_like(node: Node, x: Any) -> Any:
    return _normal(node, x.shape, x.dtype)


def _random_uniform(node: Node) -> Any:
    return _uniform(node, checked(node, node.attributes["shape"]), np.float32)


def _random_uniform_like(node: Node, x: Any) -> Any:
    return _uniform(node, x.shape, x.dtype)


def _bernoulli(node: Node, probability: Any) -> Any:
    (p,) = traced(node, probability)
    return jax.random.bernoulli(_key(node), p).astype(_dtype(node, p.dtype))


def _multinomial(node: Node, logits: Any) -> Any:
    (logits,) = traced(node, logits)
    count = node.attributes.get("sample_size", 1)
    shape = (count, logits.shape[0])
    drawn = jax.random.categorical(_key(node), logits, shape=shape)
    return drawn.T.astype(_dtype(node, np.int32))


OPERATORS: Mapping[str, Operator] = {
    "Bernoulli": _bernoulli,
    "Multinomial": _multinomial,
    "RandomNormal": _random_normal,
    "RandomNormalLike": _random_normal_like,
    "RandomUniform": _random_uniform,
    "RandomUniformLike": _random_uniform_like,
}
