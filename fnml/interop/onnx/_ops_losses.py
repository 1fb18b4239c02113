"""Losses over classes: NegativeLogLikelihoodLoss and SoftmaxCrossEntropyLoss."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._static import traced


def _loss(node: Node, log_probs: Any, labels: Any, weight: Any) -> Any:
    """Pick ``-log_probs[:, label]`` with the class's weight, and reduce.

    Args:
      log_probs: ``[B, C, ...]``.
      labels: ``[B, ...]``, integers; those equal to ``ignore_index`` weigh nothing.
      weight: ``[C]`` or ``None``.
    """
    ignored = node.attributes.get("ignore_index")
    kept = jnp.ones_like(labels, bool) if ignored is None else labels != ignored
    index = jnp.where(kept, labels, 0)
    losses = -jnp.take_along_axis(log_probs, index[:, None], axis=1)[:, 0]
    weights = jnp.ones_like(losses) if weight is None else weight[index]
    weights = jnp.where(kept, weights, 0)
    total = weights * losses
    reduction = node.attributes.get("reduction", "mean")
    if reduction == "none":
        return total
    return total.sum() if reduction == "sum" else total.sum() / weights.sum()


def _negative_log_likelihood(node: Node, log_probs: Any, labels: Any, weight: Any = None) -> Any:
    return _loss(node, *traced(node, log_probs, labels, weight))


def _softmax_cross_entropy(node: Node, scores: Any, labels: Any, weight: Any = None) -> Any:
    scores, labels, weight = traced(node, scores, labels, weight)
    log_probs = jax.nn.log_softmax(scores, axis=1)
    return _loss(node, log_probs, labels, weight), log_probs


OPERATORS: Mapping[str, Operator] = {
    "NegativeLogLikelihoodLoss": _negative_log_likelihood,
    "SoftmaxCrossEntropyLoss": _softmax_cross_entropy,
}
