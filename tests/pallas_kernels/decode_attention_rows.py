"""What is compiled of decode_attention."""

import functools

import jax.numpy as jnp
from kernel_cases import Case, shape

from fnml.pallas_kernels import decode_attention


def _whole(B, t, H, K, D, S, dtype):
    cache = shape(B, S, K, D, dtype=dtype)
    return shape(B, t, H, D, dtype=dtype), cache, cache, shape(B, dtype=jnp.int32)


def _paged(q, k, v, lengths, table, k_scale=None, v_scale=None):
    return decode_attention(q, k, v, lengths, table, k_scale=k_scale, v_scale=v_scale, window=512)


def _pages(B, H, K, D, P, page, pages, dtype):
    cache = shape(P, page, K, D, dtype=dtype)
    q = shape(B, 1, H, D, dtype=jnp.bfloat16)
    whole = (q, cache, cache, shape(B, dtype=jnp.int32), shape(B, pages, dtype=jnp.int32))
    return (*whole, *[shape(P, K, page)] * 2) if dtype == jnp.int8 else whole


CASES = [
    Case(
        "decode_attention bf16 8x8192 D=128",
        decode_attention,
        _whole(8, 1, 32, 8, 128, 8192, jnp.bfloat16),
        {"tpu": 1, "cuda": 1},
    ),
    Case(
        "decode_attention f32 soft cap 4 tokens 2x1000 D=64",
        functools.partial(decode_attention, soft_cap=30.0),
        _whole(2, 4, 12, 12, 64, 1000, jnp.float32),
        {"tpu": 1},
    ),
    Case(
        "decode_attention paged bf16 16x64x128 D=128",
        _paged,
        _pages(16, 32, 8, 128, 2048, 128, 64, jnp.bfloat16),
        {"tpu": 1, "cuda": 1},
    ),
    Case(
        "decode_attention paged int8 16x64x128 D=128",
        _paged,
        _pages(16, 32, 8, 128, 2048, 128, 64, jnp.int8),
        {"tpu": 1, "cuda": 1},
    ),
    Case(
        "decode_attention paged int8 8x128x32 D=64 f16 4 tokens",
        _paged,
        (
            shape(8, 4, 16, 64, dtype=jnp.float16),
            *[shape(4096, 32, 4, 64, dtype=jnp.int8)] * 2,
            shape(8, dtype=jnp.int32),
            shape(8, 128, dtype=jnp.int32),
            *[shape(4096, 4, 32)] * 2,
        ),
        {"cuda": 1},
    ),
    Case(
        "decode_attention paged bf16 16x512x16 D=128",
        _paged,
        _pages(16, 32, 8, 128, 16384, 16, 512, jnp.bfloat16),
        {"tpu": 1, "cuda": 1},
    ),
    Case(
        "decode_attention f16 4x4096 D=64 soft cap 2 tokens",
        functools.partial(decode_attention, soft_cap=30.0),
        _whole(4, 2, 12, 6, 64, 4096, jnp.float16),
        {"cuda": 1},
    ),
]
