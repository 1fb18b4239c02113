"""Batch normalisation with the ReLU that follows it, and with what is added between."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fnml.core import Mean
from fnml.models._batch_norm import batch_norm
from fnml.models._native import native_takes
from fnml.pallas_kernels.native import batch_norm_relu_backward, batch_norm_relu_forward, on_cpu

PyTree = Any


class _Plan(NamedTuple):
    eps: float
    added: bool


def _plain_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *residual: jax.Array, plan: _Plan
) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows = x.reshape(-1, x.shape[-1])
    mean = jnp.mean(rows, 0)
    centred = rows - mean[None]
    variance = jnp.mean(centred * centred, 0)
    out = centred * (lax.rsqrt(variance + plan.eps) * scale)[None] + bias[None]
    out = out.reshape(x.shape)
    return jax.nn.relu(residual[0] + out if plan.added else out), mean, variance


def _plain_backward(
    x: jax.Array,
    scale: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    out: jax.Array,
    grad: jax.Array,
    plan: _Plan,
) -> tuple[jax.Array, ...]:
    rows = x.reshape(-1, x.shape[-1])
    through = jnp.where(out > 0, grad, jnp.zeros_like(grad))
    slope = through.reshape(rows.shape)
    inverse = lax.rsqrt(variance + plan.eps)
    unit = (rows - mean[None]) * inverse[None]
    grad_bias, grad_scale = jnp.sum(slope, 0), jnp.sum(slope * unit, 0)
    share = 1 / rows.shape[0]
    grad_x = slope - (share * grad_bias)[None] - unit * (share * grad_scale)[None]
    grad_x = (grad_x * (scale * inverse)[None]).reshape(x.shape)
    return grad_x, grad_scale, grad_bias, *((through,) if plan.added else ())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _native(
    plan: _Plan, x: jax.Array, scale: jax.Array, bias: jax.Array, *residual: jax.Array
) -> Any:
    def native(x: jax.Array, scale: jax.Array, bias: jax.Array, *residual: jax.Array) -> Any:
        added = residual[0] if residual else None
        return batch_norm_relu_forward(x, scale, bias, added, eps=plan.eps)

    plain = functools.partial(_plain_forward, plan=plan)
    return on_cpu(native, plain, x, scale, bias, *residual)


def _forward(
    plan: _Plan, x: jax.Array, scale: jax.Array, bias: jax.Array, *residual: jax.Array
) -> Any:
    out, mean, variance = _native(plan, x, scale, bias, *residual)
    return (out, mean, variance), (x, scale, mean, variance, out)


def _backward(plan: _Plan, kept: Any, grads: Any) -> Any:
    def native(*operands: jax.Array) -> Any:
        grads = batch_norm_relu_backward(*operands, eps=plan.eps, added=plan.added)
        return grads[: 3 + plan.added]

    # The statistics leave without gradient.
    return on_cpu(native, functools.partial(_plain_backward, plan=plan), *kept, grads[0])


_native.defvjp(_forward, _backward)


def batch_norm_relu(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    state: PyTree,
    train: bool,
    residual: jax.Array | None = None,
    eps: float = 1e-5,
) -> tuple[jax.Array, PyTree]:
    """Return ``relu(residual + batch_norm(x))`` and the statistics, as :func:`batch_norm` does.

    Training within :func:`fnml.pallas_kernels.native_kernels`, this is one function in C++ on a
    CPU, for float32.
    """
    arrays = [x] if residual is None else [x, residual]
    fits = scale.shape == bias.shape == x.shape[-1:]
    if not (train and fits and native_takes(*arrays) and native_takes(scale, bias)):
        y, stats = batch_norm(x, scale, bias, state=state, train=train, eps=eps)
        return jax.nn.relu(y if residual is None else residual + y), stats
    plan = _Plan(eps, residual is not None)
    y, mean, variance = _native(plan, x, scale, bias, *arrays[1:])
    count = jnp.full_like(mean, x.size // x.shape[-1])
    moments = {"mean": mean, "square": variance + mean * mean}
    return y, jax.tree.map(lambda m: Mean(m * count, count), lax.stop_gradient(moments))
