"""Causal attention, through the kernel."""

import jax

from fnml.core import ShapeError
from fnml.pallas_kernels import Implementation, attention


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: Implementation = "auto"
) -> jax.Array:
    """Return ``softmax(q . k / sqrt(D)) v`` where each query sees the keys up to its position.

    ``q`` is [B, T, H, D]; ``k`` and ``v`` are [B, T, K, D] with H a multiple of K: query head h
    reads key head ``h // (H // K)``. The output is [B, T, H, D] in the one dtype of all three;
    scores, sums and the softmax are at least float32.

    This is :func:`fnml.pallas_kernels.attention` with ``causal=True`` for one length of queries
    and keys. Memory is linear in T. It has a custom VJP, so there is no forward mode
    (``jax.jvp``) but with ``implementation="reference"``.

    Law: changing keys and values at positions > t changes no bit of the outputs <= t, as long as
    they are finite (the weight 0 of a NaN is NaN).

    Raises:
      ShapeError: the shapes or dtypes do not fit together.

    >>> import jax.numpy as jnp
    >>> q, k = jnp.ones((2, 100, 4, 8)), jnp.ones((2, 100, 2, 8))
    >>> causal_attention(q, k, k).shape
    (2, 100, 4, 8)
    """
    fits = (
        q.ndim == k.ndim == 4
        and k.shape == v.shape
        and q.shape[:2] == k.shape[:2]
        and q.shape[3] == k.shape[3]
        and q.shape[2] % k.shape[2] == 0
        and q.dtype == k.dtype == v.dtype
    )
    if not fits:
        raise ShapeError(
            f"causal_attention got q {q.dtype} {q.shape}, k {k.dtype} {k.shape}, v {v.dtype} "
            f"{v.shape}: expected one dtype, q [B, T, H, D] and k, v [B, T, K, D] with H a "
            "multiple of K"
        )
    return attention(q, k, v, causal=True, implementation=implementation)
