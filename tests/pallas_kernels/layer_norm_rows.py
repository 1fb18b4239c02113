"""What is compiled of layer_norm."""

import jax
import jax.numpy as jnp
from kernel_cases import Case, shape

from fnml.pallas_kernels import layer_norm


def _grad(x, scale, bias, residual):
    def loss(x, scale, bias, residual):
        y, total = layer_norm(x, scale, bias, residual)
        return (y.astype(jnp.float32) ** 2).sum() + total.astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2, 3))(x, scale, bias, residual)


def _arguments(rows, width, dtype):
    x = shape(rows, width, dtype=dtype)
    return (x, shape(width), shape(width), x)


CASES = [
    Case(
        "layer_norm f32 8192x1024",
        layer_norm,
        _arguments(8192, 1024, jnp.float32)[:2],
        {"tpu": 1, "cuda": 1},
    ),
    Case(
        "layer_norm grad bf16 8192x4096",
        _grad,
        _arguments(8192, 4096, jnp.bfloat16),
        {"tpu": 2, "cuda": 2},
    ),
    Case(
        "layer_norm grad f32 4101x2048",
        _grad,
        _arguments(4101, 2048, jnp.float32),
        {"tpu": 2, "cuda": 2},
    ),
    Case("layer_norm grad f32 260x32768", _grad, _arguments(260, 32768, jnp.float32), {"tpu": 2}),
    Case("layer_norm grad f16 22000x768", _grad, _arguments(22000, 768, jnp.float16), {"cuda": 2}),
    Case(
        "layer_norm grad bf16 1200x16384",
        _grad,
        _arguments(1200, 16384, jnp.bfloat16),
        {"tpu": 2, "cuda": 2},
    ),
]
