"""Attention, as rows to lower and to compile."""

from functools import partial

import jax
import jax.numpy as jnp
from kernel_cases import Case, shape

from fnml.pallas_kernels import attention


def _arguments(B, T, S, H, K, D, dtype):
    q, k = shape(B, T, H, D, dtype=dtype), shape(B, S, K, D, dtype=dtype)
    return q, k, k


def _grads(**options):
    def loss(q, k, v, **arrays):
        return attention(q, k, v, **options, **arrays).astype(jnp.float32).sum()

    return jax.value_and_grad(loss, (0, 1, 2))


def _segments(q, k, v, segments):
    def loss(q, k, v):
        out = attention(q, k, v, causal=True, segment_ids=segments)
        return out.astype(jnp.float32).sum()

    return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)


def _everything(q, k, v, bias, mask, key):
    def loss(q, k, v, bias):
        out = attention(
            q, k, v, causal=True, window=700, bias=bias, mask=mask, soft_cap=30.0, dropout=0.1,
            key=jax.random.wrap_key_data(key),
        )  # fmt: skip
        return out.astype(jnp.float32).sum()

    return jax.value_and_grad(loss, (0, 1, 2, 3))(q, k, v, bias)


bf16, f32 = jnp.bfloat16, jnp.float32
CASES = [
    Case(
        "attention forward bf16 T=2048 D=128",
        partial(attention, causal=True),
        _arguments(1, 2048, 2048, 8, 2, 128, bf16),
        {"tpu": 1, "cuda": 1},
    ),
    Case(
        "attention grad bf16 T=2048 D=128",
        _grads(causal=True),
        _arguments(2, 2048, 2048, 8, 2, 128, bf16),
        {"tpu": 3, "cuda": 3},
    ),
    Case(
        "attention grad bf16 T=1024 D=64 window",
        _grads(causal=True, window=256),
        _arguments(2, 1024, 1024, 8, 8, 64, bf16),
        {"tpu": 3, "cuda": 3},
    ),
    Case(
        "attention grad f16 T=1024 S=512 D=128",
        _grads(),
        _arguments(1, 1024, 512, 4, 4, 128, jnp.float16),
        {"cuda": 3},
    ),
    Case(
        "attention grad f32 T=1000 S=1500 D=64",
        _grads(),
        _arguments(1, 1000, 1500, 4, 2, 64, f32),
        {"tpu": 3},
    ),
    Case(
        "attention grad f32 T=1024 D=256",
        _grads(causal=True),
        _arguments(1, 1024, 1024, 4, 2, 256, f32),
        {"tpu": 3},
    ),
    Case(
        "attention grad bf16 T=1024 D=64 segments",
        _segments,
        (*_arguments(2, 1024, 1024, 4, 2, 64, bf16), shape(2, 1024, dtype=jnp.int32)),
        {"tpu": 3},
    ),
    Case(
        "attention grad f32 T=1024 D=64 everything",
        _everything,
        (
            *_arguments(1, 1024, 1024, 2, 1, 64, f32),
            shape(1, 2, 1024, 1024),
            shape(1, 1, 1024, 1024, dtype=jnp.bool_),
            shape(2, dtype=jnp.uint32),
        ),
        {"tpu": 3},
    ),
    Case(
        "attention grad f32 T=128 D=64, too short to be worth it",
        _grads(causal=True),
        _arguments(1, 128, 128, 4, 2, 64, f32),
        {},
    ),
]
