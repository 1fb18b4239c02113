"""cuDNN's attention, through ``jax.nn``: a library's kernel that brings its own derivative."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fnml.pallas_kernels.attention._tiles import Extras, Plan


def attention(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    lengths: jax.Array | None,
) -> jax.Array:
    """Return the output [B, T, H, D] of a call in which :func:`faults` found none."""
    sizes = None
    if lengths is not None:
        # What cuDNN makes of a row without keys is not documented: it gets one, and then zeros.
        sizes = jnp.clip(lengths.astype(jnp.int32), 1, k.shape[1])
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias,
        scale=float(plan.scale),
        is_causal=plan.right == 0,
        key_value_seq_lengths=sizes,
        local_window_size=None if plan.left is None else (plan.left, 0),
        implementation="cudnn",
    )
    if lengths is None:
        return out
    return jnp.where((lengths > 0)[:, None, None, None], out, 0.0)


def faults(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    extras: Extras,
    segment_ids: Any,
    lengths: jax.Array | None,
) -> list[str]:
    """Say why this call cannot go to cuDNN; an empty list if it can.

    JAX asks for the library and the GPU already while tracing, and what it says comes last.
    """
    T, D, S = q.shape[1], q.shape[3], k.shape[1]
    found = []
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        found.append(f"dtype {q.dtype} (it takes float16 and bfloat16)")
    if D > 256 or D % 8:
        found.append(f"head width {D} (it takes multiples of 8 up to 256, up to 128 before Hopper)")
    if not (isinstance(T, int) and isinstance(S, int)):
        found.append(f"lengths T={T}, S={S} (it takes numbers)")
    elif plan.right not in (None, 0) or (plan.left is not None and plan.right is None):
        found.append("window to the right (it takes windows of causal attention)")
    elif plan.left is not None and (lengths is not None or T - plan.left > S):
        found.append("window that may leave a query without a key (it would not get 0)")
    if extras.bias is not None and not _takes(extras.bias, q, k):
        found.append(
            f"bias {extras.bias.dtype} {extras.bias.shape} (it takes {q.dtype} "
            f"[B | 1, H | 1, {T}, {S}] with even T and S)"
        )
    names = {"segment_ids": segment_ids, "dropout": extras.seed}
    found += [f"{name} (it has none like ours)" for name, x in names.items() if x is not None]
    if extras.mask is not None:
        found.append("mask (a query without a key would not get 0)")
    if plan.soft_cap is not None:
        found.append("soft_cap (it has none)")
    return found or _unavailable(plan, q, k, extras.bias, lengths)


def _takes(bias: jax.Array, q: jax.Array, k: jax.Array) -> bool:
    T, S = q.shape[1], k.shape[1]
    return bias.dtype == q.dtype and bias.shape[2:] == (T, S) and T % 2 == S % 2 == 0


def _unavailable(plan: Plan, q: Any, k: Any, bias: Any, lengths: Any) -> list[str]:
    """Ask JAX, which refuses to trace cuDNN where it is not installed or the GPU is too old."""
    try:
        jax.eval_shape(partial(attention, plan), q, k, k, bias, lengths)
    except RuntimeError as error:
        return [str(error).rstrip(".")]
    return []
