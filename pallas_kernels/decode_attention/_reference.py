"""The textbook form: the whole cache as floats, and a softmax over it."""

import jax
import jax.numpy as jnp

from fnml.pallas_kernels._dtypes import wide
from fnml.pallas_kernels.decode_attention._operands import Operands, Options, in_order


def reference(operands: Operands, options: Options) -> jax.Array:
    """Return what the queries read, [B, t, H, D]."""
    q, k, v, lengths, *_ = operands = in_order(operands)
    dtype = wide(q.dtype)
    k, v = k.astype(dtype), v.astype(dtype)
    if operands.k_scale is not None:
        k = k * jnp.swapaxes(operands.k_scale, 1, 2).astype(dtype)[..., None]
    if operands.v_scale is not None:
        v = v * jnp.swapaxes(operands.v_scale, 1, 2).astype(dtype)[..., None]
    (B, t, H, D), S, K = q.shape, k.shape[1], k.shape[2]
    grouped = q.astype(dtype).reshape(B, t, K, H // K, D)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k) * D**-0.5
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    query = lengths[:, None] - t + jnp.arange(t)[None, :]  # [B, t]
    key = jnp.arange(S)[None, None, :]
    seen = key <= query[:, :, None]
    if options.window is not None:
        seen &= key > query[:, :, None] - options.window
    weights = jax.nn.softmax(scores, axis=-1, where=seen[:, None, None])
    weights = jnp.where(seen.any(-1)[:, None, None, :, None], weights, 0.0)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v)
    return out.reshape(B, t, H, D).astype(q.dtype)
