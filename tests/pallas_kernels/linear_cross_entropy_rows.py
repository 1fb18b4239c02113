"""Linear layer and cross entropy, as rows to lower and to compile."""

import jax
import jax.numpy as jnp
from kernel_cases import Case, shape

from fnml.pallas_kernels import linear_cross_entropy


def _grads(**options):
    def run(x, w, labels):
        def loss(x, w):
            total, weight = linear_cross_entropy(x, w, labels, **options)
            return total / weight

        return jax.value_and_grad(loss, (0, 1))(x, w)

    return run


def _arguments(N, D, V, dtype):
    labels = shape(N, dtype=jnp.int32)
    return shape(N, D, dtype=dtype), shape(D, V, dtype=dtype), labels


CASES = [
    Case(
        "linear_cross_entropy bf16 N=4096 D=1024 V=32768",
        lambda x, w, labels: linear_cross_entropy(x, w, labels)[0],
        _arguments(4096, 1024, 32768, jnp.bfloat16),
        {"tpu": 1, "cuda": 1},
    ),
    Case(
        "linear_cross_entropy grad bf16 N=8192 D=768 V=50257",
        _grads(label_smoothing=0.1, z_loss=1e-4),
        _arguments(8192, 768, 50257, jnp.bfloat16),
        {"tpu": 3, "cuda": 2},
    ),
    Case(
        "linear_cross_entropy grad f16 N=1000 D=512 V=8192",
        _grads(),
        _arguments(1000, 512, 8192, jnp.float16),
        {"cuda": 2},
    ),
    Case(
        "linear_cross_entropy grad f32 N=2048 D=1024 V=32768",
        _grads(label_smoothing=0.1, z_loss=1e-4),
        _arguments(2048, 1024, 32768, jnp.float32),
        {"tpu": 3},
    ),
    Case(
        "linear_cross_entropy grad f32 N=1000 D=512 V=5003",
        _grads(),
        _arguments(1000, 512, 5003, jnp.float32),
        {"tpu": 3},
    ),
    Case(
        "linear_cross_entropy grad f32 N=2048 D=2048 V=32768, lax is dearer in traffic only",
        _grads(),
        _arguments(2048, 2048, 32768, jnp.float32),
        {},
    ),
]
