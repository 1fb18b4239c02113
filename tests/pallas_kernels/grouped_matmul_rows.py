"""What is compiled of grouped_matmul."""

import jax
import jax.numpy as jnp
from kernel_cases import Case, shape

from fnml.pallas_kernels import grouped_matmul


def _grad(x, w, group_sizes):
    def loss(x, w):
        return (grouped_matmul(x, w, group_sizes).astype(jnp.float32) ** 2).sum()

    return jax.grad(loss, (0, 1))(x, w)


def _arguments(N, E, D, F, dtype):
    return shape(N, D, dtype=dtype), shape(E, D, F), shape(E, dtype=jnp.int32)


CASES = [
    Case(
        "grouped_matmul bf16 8192x1024x2816 16 groups",
        grouped_matmul,
        _arguments(8192, 16, 1024, 2816, jnp.bfloat16),
        {"tpu": 1, "cuda": 1},
    ),
    Case(
        "grouped_matmul grad bf16 8192x1024x2816 8 groups",
        _grad,
        _arguments(8192, 8, 1024, 2816, jnp.bfloat16),
        {"tpu": 3, "cuda": 3},
    ),
    Case(
        "grouped_matmul grad f16 1001x384x896 16 groups",
        _grad,
        _arguments(1001, 16, 384, 896, jnp.float16),
        {"cuda": 3},
    ),
    Case(
        "grouped_matmul grad f32 1001x256x384 16 groups",
        _grad,
        _arguments(1001, 16, 256, 384, jnp.float32),
        {"tpu": 3},
    ),
]
