"""What is compiled of quantized_matmul."""

import functools

import jax
import jax.numpy as jnp
from kernel_cases import Case, shape

from fnml.pallas_kernels import quantized_matmul


def _grad(x, codes, scale, zero=None, *, bits):
    def loss(x):
        return (quantized_matmul(x, codes, scale, zero, bits=bits).astype(jnp.float32) ** 2).sum()

    return jax.grad(loss)(x)


def _arguments(M, K, N, bits, groups, dtype, zero=False):
    kind = jnp.int8 if bits == 8 and not zero else jnp.uint8
    arrays = (
        shape(M, K, dtype=dtype),
        shape(K if bits == 8 else K // 2, N, dtype=kind),
        shape(groups, N),
    )
    return (*arrays, shape(groups, N, dtype=jnp.uint8)) if zero else arrays


CASES = [
    Case(
        "quantized_matmul int8 bf16 1x4096x4096",
        quantized_matmul,
        _arguments(1, 4096, 4096, 8, 1, jnp.bfloat16),
        {"tpu": 1, "cuda": 1},
    ),
    Case(
        "quantized_matmul int4 bf16 16x4096x11008 groups of 128",
        functools.partial(quantized_matmul, bits=4),
        _arguments(16, 4096, 11008, 4, 32, jnp.bfloat16),
        {"tpu": 1},
    ),
    Case(
        "quantized_matmul int4 zero bf16 8x4096x8192 groups of 128",
        functools.partial(quantized_matmul, bits=4),
        _arguments(8, 4096, 8192, 4, 32, jnp.bfloat16, zero=True),
        {"tpu": 1, "cuda": 1},
    ),
    Case(
        "quantized_matmul grad int4 f16 1x4096x14336 groups of 64",
        functools.partial(_grad, bits=4),
        _arguments(1, 4096, 14336, 4, 64, jnp.float16),
        {"cuda": 1},
    ),
    Case(
        "quantized_matmul grad int8 zero f32 1000x2048x1024 groups of 64",
        functools.partial(_grad, bits=8),
        _arguments(1000, 2048, 1024, 8, 32, jnp.float32, zero=True),
        {"tpu": 2},
    ),
    Case(
        "quantized_matmul grad int4 bf16 512x2048x2048",
        functools.partial(_grad, bits=4),
        _arguments(512, 2048, 2048, 4, 1, jnp.bfloat16),
        {"tpu": 2},
    ),
]
