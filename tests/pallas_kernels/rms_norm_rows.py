"""What is compiled of rms_norm."""

import jax
import jax.numpy as jnp
from kernel_cases import Case, shape

from fnml.pallas_kernels import rms_norm


def _grad(x, scale, residual):
    def loss(x, scale, residual):
        y, total = rms_norm(x, scale, residual)
        return (y.astype(jnp.float32) ** 2).sum() + total.astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2))(x, scale, residual)


def _arguments(rows, width, dtype):
    return (shape(rows, width, dtype=dtype), shape(width), shape(rows, width, dtype=dtype))


CASES = [
    Case(
        "rms_norm f32 8192x1024",
        rms_norm,
        _arguments(8192, 1024, jnp.float32)[:2],
        {"tpu": 1, "cuda": 1},
    ),
    Case(
        "rms_norm grad bf16 8192x4096",
        _grad,
        _arguments(8192, 4096, jnp.bfloat16),
        {"tpu": 2, "cuda": 2},
    ),
    Case(
        "rms_norm grad f32 4101x2048",
        _grad,
        _arguments(4101, 2048, jnp.float32),
        {"tpu": 2, "cuda": 2},
    ),
    Case("rms_norm grad f32 260x32768", _grad, _arguments(260, 32768, jnp.float32), {"tpu": 2}),
    Case("rms_norm grad f16 4096x5120", _grad, _arguments(4096, 5120, jnp.float16), {"cuda": 2}),
    Case(
        "rms_norm grad f32 600x16384",
        _grad,
        _arguments(600, 16384, jnp.float32),
        {"tpu": 2, "cuda": 2},
    ),
    Case(
        "rms_norm f16 600x32768, too wide for a GPU and of no dtype of a TPU",
        rms_norm,
        _arguments(600, 32768, jnp.float16)[:2],
        {},
    ),
]
