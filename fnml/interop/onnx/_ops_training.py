"""Optimizer steps of the domain ai.onnx.preview.training: Adagrad, Adam, Momentum."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._static import traced


def _per_tensor(slots: int, update: Callable[..., tuple[Any, ...]]) -> Operator:
    """Make an operator of ``update(node, rate, count, x, gradient, *state)``.

    ONNX hands the tensors of all parameters in one list: every X, then every gradient, then every
    state of the first kind, and so on; the outputs likewise, without the gradients.
    """

    def operator(node: Node, rate: Any, count: Any, *tensors: Any) -> tuple[Any, ...]:
        rate, count, *flat = traced(node, rate, count, *tensors)
        each = len(flat) // (2 + slots)
        groups = [flat[i * each : (i + 1) * each] for i in range(2 + slots)]
        results = [
            update(node, rate.reshape(()), count.reshape(()), *values)
            for values in zip(*groups, strict=True)
        ]
        return tuple(r[i] for i in range(1 + slots) for r in results)

    return operator


def _regularized(node: Node, x: Any, gradient: Any) -> Any:
    return gradient + node.attributes.get("norm_coefficient", 0.0) * x


def _adagrad(node: Node, rate: Any, count: Any, x: Any, gradient: Any, squares: Any) -> Any:
    decay = node.attributes.get("decay_factor", 0.0)
    rate = (rate / (1 + count.astype(rate.dtype) * decay)).astype(x.dtype)
    gradient = _regularized(node, x, gradient)
    squares = squares + gradient**2
    return x - rate * gradient / (jnp.sqrt(squares) + node.attributes.get("epsilon", 0.0)), squares


def _adam(node: Node, rate: Any, count: Any, x: Any, gradient: Any, mean: Any, square: Any) -> Any:
    alpha, beta = node.attributes.get("alpha", 0.9), node.attributes.get("beta", 0.999)
    gradient = _regularized(node, x, gradient)
    mean = alpha * mean + (1 - alpha) * gradient
    square = beta * square + (1 - beta) * gradient**2
    steps = count.astype(rate.dtype)
    corrected = rate * jnp.sqrt(1 - beta**steps) / (1 - alpha**steps)
    rate = jnp.where(count > 0, corrected, rate).astype(x.dtype)
    x = x - rate * mean / (jnp.sqrt(square) + node.attributes.get("epsilon", 0.0))
    return (1 - node.attributes.get("norm_coefficient_post", 0.0)) * x, mean, square


def _momentum(node: Node, rate: Any, count: Any, x: Any, gradient: Any, velocity: Any) -> Any:
    alpha = node.attributes["alpha"]
    gradient = _regularized(node, x, gradient)
    beta = jnp.where(count > 0, node.attributes["beta"], 1.0).astype(x.dtype)
    velocity = alpha * velocity + beta * gradient
    ahead = gradient + alpha * velocity if node.attributes["mode"] == "nesterov" else velocity
    return x - rate.astype(x.dtype) * ahead, velocity


OPERATORS: Mapping[str, Operator] = {
    "ai.onnx.preview.training.Adagrad": _per_tensor(1, _adagrad),
    "ai.onnx.preview.training.Adam": _per_tensor(2, _adam),
    "ai.onnx.preview.training.Momentum": _per_tensor(1, _momentum),
}
