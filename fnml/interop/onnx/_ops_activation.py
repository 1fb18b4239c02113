"""Activations and what is made of them."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._ops_math import old_broadcast, unary
from fnml.interop.onnx._static import align, axis_of, traced


def _with(function: Callable[..., Any], **defaults: float) -> Operator:
    """Make an operator of ``function(x, *numbers)``; the numbers are attributes with defaults."""

    def run(node: Node, x: Any) -> Any:
        (x,) = traced(node, x)
        numbers = [node.attributes.get(name, value) for name, value in defaults.items()]
        return function(x, *numbers).astype(x.dtype)

    return run


def _elu(x: Any, alpha: float) -> Any:
    return jnp.where(x > 0, x, alpha * jnp.expm1(jnp.minimum(x, 0)))


def _selu(x: Any, alpha: float, gamma: float) -> Any:
    return gamma * _elu(x, alpha)


def _celu(x: Any, alpha: float) -> Any:
    return jnp.maximum(x, 0) + jnp.minimum(0, alpha * jnp.expm1(jnp.minimum(x, 0) / alpha))


def _hard_sigmoid(x: Any, alpha: float, beta: float) -> Any:
    return jnp.clip(alpha * x + beta, 0, 1)


def _shrink(x: Any, bias: float, lambd: float) -> Any:
    zero = jnp.zeros_like(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        # Integers are compared with the threshold, not with what a cast would leave of it.
        bias_ = jnp.asarray(math.trunc(bias), x.dtype)
        return jnp.where(x > lambd, x - bias_, jnp.where(x < -lambd, x + bias_, zero))
    return jnp.where(x < -lambd, x + bias, jnp.where(x > lambd, x - bias, zero))


def _gelu(node: Node, x: Any) -> Any:
    (x,) = traced(node, x)
    return jax.nn.gelu(x, approximate=node.attributes.get("approximate", "none") == "tanh")


def _prelu(node: Node, x: Any, slope: Any) -> Any:
    if node.version < 7 and slope.ndim == 1 and x.ndim > 1 and slope.size > 1:
        slope = slope.reshape((-1,) + (1,) * (x.ndim - 2))
    x, slope = align(node, *traced(node, x, old_broadcast(node, x, slope)))
    return jnp.where(x < 0, x * slope, x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _softmax(x: Any, axis: int) -> Any:
    """Compute ``jax.nn.softmax``, also where XLA computes ``x`` anew for the subtraction.

    Fused with the product that made ``x``, ``x - max`` subtracts from what was not rounded, and of
    numbers in the billions hundreds are left over: the greatest one is told by comparison instead.
    """
    greatest = jnp.max(x, axis, keepdims=True)
    below = jnp.where((x >= greatest) & jnp.isfinite(greatest), jnp.zeros_like(x), x - greatest)
    powers = jnp.exp(below)
    return powers / powers.sum(axis, keepdims=True)


@_softmax.defjvp
def _softmax_jvp(axis: int, primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    (x,), (tangent,) = primals, tangents
    y = _softmax(x, axis)
    return y, y * (tangent - (y * tangent).sum(axis, keepdims=True))


def _along_axis(function: Callable[..., Any]) -> Operator:
    """Make softmax or the like: over one axis, before opset 13 over all from that axis on."""

    def run(node: Node, x: Any) -> Any:
        (x,) = traced(node, x)
        if node.version >= 13:
            return function(x, axis_of(node, node.attributes.get("axis", -1), x.ndim))
        axis = axis_of(node, node.attributes.get("axis", 1), max(x.ndim, 2))
        flat = x.reshape(math.prod(x.shape[:axis]), -1)
        return function(flat, 1).reshape(x.shape)

    return run


def _swish(x: Any, alpha: float) -> Any:
    return x * jax.nn.sigmoid(alpha * x)


OPERATORS: Mapping[str, Operator] = {
    "Celu": _with(_celu, alpha=1.0),
    "Elu": _with(_elu, alpha=1.0),
    "Gelu": _gelu,
    "HardSigmoid": _with(_hard_sigmoid, alpha=0.2, beta=0.5),
    "HardSwish": _with(lambda x: x * jnp.clip(x / 6 + 0.5, 0, 1)),
    "LeakyRelu": _with(lambda x, alpha: jnp.where(x < 0, alpha * x, x), alpha=0.01),
    "LogSoftmax": _along_axis(jax.nn.log_softmax),
    "Mish": _with(lambda x: x * jnp.tanh(jax.nn.softplus(x))),
    "PRelu": _prelu,
    "Relu": unary(lambda x: jnp.maximum(x, 0), lambda x: np.maximum(x, 0)),
    "Selu": _with(_selu, alpha=1.67326319217681884765625, gamma=1.05070102214813232421875),
    "Shrink": _with(_shrink, bias=0.0, lambd=0.5),
    "Sigmoid": unary(lax.logistic),
    "Softmax": _along_axis(_softmax),
    "Softplus": unary(jax.nn.softplus),
    "Softsign": unary(jax.nn.soft_sign),
    "Swish": _with(_swish, alpha=1.0),
    "Tanh": unary(jnp.tanh),
    "ThresholdedRelu": _with(lambda x, alpha: jnp.where(x > alpha, x, 0), alpha=1.0),
}
