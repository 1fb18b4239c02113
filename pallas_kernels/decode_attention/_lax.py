"""The form for every platform: by blocks, or whole where a plain cache is no longer than one."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from fnml.pallas_kernels._dtypes import wide
from fnml.pallas_kernels.decode_attention._blocks import LAX_BLOCK
from fnml.pallas_kernels.decode_attention._operands import Operands, Options
from fnml.pallas_kernels.decode_attention._reference import reference


def forward(operands: Operands, options: Options) -> jax.Array:
    """Return what the queries read, [B, t, H, D]."""
    plain = operands.page_table is None and operands.k_scale is None and operands.v_scale is None
    whole = plain and operands.length <= LAX_BLOCK
    return _whole(operands, options) if whole else _blocked(options, operands)


def _whole(operands: Operands, options: Options) -> jax.Array:
    q, k, v, lengths, *_ = operands
    (B, t, H, D), (S, K) = q.shape, k.shape[1:3]
    grouped = q.reshape(B, t, K, H // K, D) * D**-0.5
    scores = jnp.einsum(
        "btkgd,bskd->bkgts", grouped, k.astype(q.dtype), preferred_element_type=wide(q.dtype)
    )
    seen = _seen(jnp.arange(S), lengths, t, options)  # [B, t, S]
    scores = jnp.where(seen[:, None, None], _capped(scores, options), -jnp.inf)
    # A query that sees nothing reads nothing: without a maximum its weights would be NaN.
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jax.nn.softmax(jnp.where(top == -jnp.inf, 0.0, scores), axis=-1)
    weights = jnp.where(top == -jnp.inf, 0.0, weights).astype(q.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v.astype(q.dtype))
    return out.reshape(B, t, H, D)


def _seen(keys: jax.Array, lengths: jax.Array, t: int, options: Options) -> jax.Array:
    """Tell [B, t, S] whether query i of sequence b sees the key at position ``keys`` [S]."""
    query = lengths[:, None, None] - t + jnp.arange(t)[None, :, None]
    key = keys[None, None, :]
    seen = key <= query
    return seen if options.window is None else seen & (key > query - options.window)


def _capped(scores: jax.Array, options: Options) -> jax.Array:
    if options.soft_cap is None:
        return scores
    return options.soft_cap * jnp.tanh(scores / options.soft_cap)


# The loop ends with the longest sequence, and a loop of unknown length has no derivative.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _blocked(options: Options, operands: Operands) -> jax.Array:
    q, _, _, lengths, *_ = operands
    (B, t, H, D), K, dtype = q.shape, operands.k.shape[2], wide(q.dtype)
    size = operands.k.shape[1] if operands.page_table is not None else LAX_BLOCK
    size = min(size, operands.length)
    blocks = -(-operands.length // size)
    grouped = q.reshape(B, t, K, H // K, D) * D**-0.5

    def turn(index: jax.Array, state: tuple) -> tuple:
        top, total, out = state
        # The last block begins earlier where blocks do not divide S; it sees only what is new.
        start = jnp.minimum(index * size, operands.length - size)
        k, v, k_scale, v_scale = _block(operands, index, start, size)
        keys = start + jnp.arange(size)
        scores = jnp.einsum(
            "btkgd,bskd->bkgts", grouped, k.astype(q.dtype), preferred_element_type=dtype
        )
        if k_scale is not None:
            scores = scores * k_scale[:, :, None, None, :].astype(dtype)
        seen = _seen(keys, lengths, t, options) & (keys >= index * size)[None, None, :]
        scores = jnp.where(seen[:, None, None], _capped(scores, options), -jnp.inf)
        higher = jnp.maximum(top, jnp.max(scores, axis=-1))
        # Before the first key a query sees, both are -inf, and their difference would be NaN.
        base = jnp.where(higher == -jnp.inf, 0.0, higher)
        weights = jnp.exp(scores - base[..., None])
        fade = jnp.exp(top - base)
        total = total * fade + jnp.sum(weights, axis=-1)
        if v_scale is not None:
            weights = weights * v_scale[:, :, None, None, :].astype(dtype)
        read = jnp.einsum(
            "bkgts,bskd->bkgtd",
            weights.astype(q.dtype),
            v.astype(q.dtype),
            preferred_element_type=dtype,
        )
        return higher, total, out * fade[..., None] + read

    shape = (B, K, H // K, t)
    state = (
        jnp.full(shape, -jnp.inf, dtype),
        jnp.zeros(shape, dtype),
        jnp.zeros((*shape, D), dtype),
    )
    stop = jnp.minimum(blocks, lax.div(jnp.max(lengths) + size - 1, size))
    _, total, out = lax.fori_loop(0, stop, turn, state)
    out = out / jnp.where(total == 0, 1.0, total)[..., None]
    return jnp.moveaxis(out, 3, 1).reshape(B, t, H, D).astype(q.dtype)


@_blocked.defjvp
def _(options: Options, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    def textbook(operands: Operands) -> jax.Array:
        return reference(operands, options)

    return _blocked(options, *primals), jax.jvp(textbook, primals, tangents)[1]


def _block(
    operands: Operands, index: jax.Array, start: jax.Array, size: int
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Return keys and values [B, size, K, D] and their scales [B, K, size] of one block."""

    def take(cache: jax.Array | None, time: int) -> jax.Array | None:
        if cache is None:
            return None
        if operands.page_table is None:
            return lax.dynamic_slice_in_dim(cache, start, size, time)
        numbers = lax.dynamic_index_in_dim(operands.page_table, index, 1, keepdims=False)
        return jnp.take(cache, numbers, axis=0, mode="clip")

    k, v = take(operands.k, 1), take(operands.v, 1)
    assert k is not None and v is not None
    return k, v, take(operands.k_scale, 2), take(operands.v_scale, 2)
