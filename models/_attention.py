"""Causal attention in blocks of queries, without a T x T array."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fnml.core import ShapeError
from fnml.models._wide import wide

_MOST_SEGMENTS = 8


class _Segment(NamedTuple):
    """``blocks`` runs of ``block`` queries from ``start``; all of them read the keys [0, stop)."""

    start: int
    blocks: int
    block: int

    @property
    def stop(self) -> int:
        return self.start + self.blocks * self.block

    def split(self, x: jax.Array) -> jax.Array:
        """Cut this segment out of [B, K, G, T, D], as [blocks, B, K, G * block, D]."""
        B, K, G, _, D = x.shape
        x = x[:, :, :, self.start : self.stop].reshape(B, K, G, self.blocks, self.block, D)
        return jnp.moveaxis(x, 3, 0).reshape(self.blocks, B, K, G * self.block, D)

    def join(self, x: jax.Array) -> jax.Array:
        """Undo :meth:`split`: [blocks, B, K, G * block, D] to [B, K, G, blocks * block, D]."""
        n, B, K, rows, D = x.shape
        x = x.reshape(n, B, K, rows // self.block, self.block, D)
        return jnp.moveaxis(x, 0, 3).reshape(B, K, -1, n * self.block, D)

    def scores(self, index: jax.Array, q: jax.Array, k: jax.Array) -> jax.Array:
        """Return float32 q . k [B, K, G * block, stop] of one block, -inf where k is ahead."""
        rows = q.shape[2]
        scores = _dot(q, k, 3, 3, wide(q.dtype))
        # Row r of a block holds query r % block: the G heads of a group lie one after another.
        query = self.start + index * self.block + jnp.arange(rows) % self.block
        seen = jnp.arange(self.stop)[None, :] <= query[:, None]
        return jnp.where(seen[None, None], scores, -jnp.inf)


def _segments(length: int) -> list[_Segment]:
    """Cut T queries into at most eight unrolled segments of looped blocks, and a remainder.

    Up to 1,024 queries each segment is one block. Beyond that the blocks of a segment run in a
    loop, which keeps both the memory and the size of the program linear in T; what
    the first blocks of a segment read in vain is at most a sixteenth of the T x T pairs.
    """
    block = 64 if length <= 512 else 128
    full = length // block
    per = max(1, -(-full // _MOST_SEGMENTS))
    cut = [_Segment(i * block, min(per, full - i), block) for i in range(0, full, per)]
    rest = length - full * block
    return [*cut, _Segment(full * block, 1, rest)] if rest else cut


def _dot(a: jax.Array, b: jax.Array, over_a: int, over_b: int, dtype: Any) -> jax.Array:
    """Multiply matrices [B, K, ...] by [B, K, ...], contracting the given axes."""
    dimensions = (((over_a,), (over_b,)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, dimensions, preferred_element_type=dtype)


def _group(q: jax.Array, K: int) -> jax.Array:
    """[B, T, H, D] to [B, K, G, T, D]: query head h reads key head h // G."""
    B, T, H, D = q.shape
    return q.reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)


def _ungroup(q: jax.Array) -> jax.Array:
    """[B, K, G, T, D] to [B, T, H, D]."""
    B, K, G, T, D = q.shape
    return q.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, D)


@jax.custom_vjp
def _attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _forward(q, k, v)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple]:
    dtype, sums = q.dtype, wide(q.dtype)
    grouped = _group(q, k.shape[2]) * q.shape[-1] ** -0.5  # [B, K, G, T, D]
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, K, T, D]
    outs, logs = [], []
    for segment in _segments(q.shape[1]):
        seen_keys, seen_values = keys[:, :, : segment.stop], values[:, :, : segment.stop]

        def block(_, inputs, segment=segment, k=seen_keys, v=seen_values):
            index, q = inputs
            scores = segment.scores(index, q, k)  # [B, K, G * block, stop]
            top = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = weights.sum(-1, keepdims=True)
            out = _dot(weights.astype(dtype), v, 3, 2, sums) / total  # [B, K, G * block, D]
            return None, (out.astype(dtype), top + jnp.log(total))

        indices = jnp.arange(segment.blocks)
        _, (out, log) = lax.scan(block, None, (indices, segment.split(grouped)))
        outs.append(segment.join(out))
        logs.append(log)
    out = jnp.concatenate(outs, 3)
    return _ungroup(out), (grouped, keys, values, out, logs)


def _backward(residuals: tuple, grad: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    grouped, keys, values, out, logs = residuals
    dtype, sums = grouped.dtype, wide(grouped.dtype)
    grad = _group(grad, keys.shape[1])
    # sum(P * dP) over the keys, which the softmax's VJP needs, equals sum(out * grad) over D.
    inner = (out.astype(sums) * grad.astype(sums)).sum(-1, keepdims=True)
    grad_q = []
    grad_k, grad_v = jnp.zeros(keys.shape, sums), jnp.zeros(values.shape, sums)
    for segment, log in zip(_segments(grouped.shape[3]), logs, strict=True):
        seen_keys, seen_values = keys[:, :, : segment.stop], values[:, :, : segment.stop]

        def block(carry, inputs, segment=segment, k=seen_keys, v=seen_values):
            index, q, g, inner, log = inputs
            weights = jnp.exp(segment.scores(index, q, k) - log)  # [B, K, G * block, stop]
            slope = (weights * (_dot(g, v, 3, 3, sums) - inner)).astype(dtype)
            grad_k = carry[0] + _dot(slope, q, 2, 2, sums)  # [B, K, stop, D]
            grad_v = carry[1] + _dot(weights.astype(dtype), g, 2, 2, sums)
            return (grad_k, grad_v), _dot(slope, k, 3, 2, sums)

        zeros = jnp.zeros_like(seen_keys, sums)
        blocks = (segment.split(grouped), segment.split(grad), segment.split(inner), log)
        (more_k, more_v), part = lax.scan(
            block, (zeros, zeros), (jnp.arange(segment.blocks), *blocks)
        )
        grad_q.append(segment.join(part))
        grad_k = grad_k.at[:, :, : segment.stop].add(more_k)
        grad_v = grad_v.at[:, :, : segment.stop].add(more_v)
    scaled = jnp.concatenate(grad_q, 3) * grouped.shape[-1] ** -0.5
    back_k, back_v = grad_k.transpose(0, 2, 1, 3), grad_v.transpose(0, 2, 1, 3)
    return _ungroup(scaled).astype(dtype), back_k.astype(dtype), back_v.astype(dtype)


_attention.defvjp(_forward, _backward)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Return ``softmax(q . k / sqrt(D)) v`` where each query sees the keys up to its position.

    ``q`` is [B, T, H, D]; ``k`` and ``v`` are [B, T, K, D] with H a multiple of K: query head h
    reads key head ``h // (H // K)``. The output is [B, T, H, D] in the one dtype of all three;
    scores, sums and the softmax are at least float32.

    Queries are taken in static blocks that read only keys they may see, and the backward pass
    computes the weights again from each row's log-sum-exp. So about half of the products of the
    textbook form are done, and memory is linear in T. It has a custom VJP, so there
    is no forward mode (``jax.jvp``).

    Law: changing keys and values at positions > t changes no bit of the outputs <= t, as long as
    they are finite (the weight 0 of a NaN is NaN).

    Source: Dao 2023, arXiv:2307.08691, algorithms 1 and 2; groups: Ainslie et al. 2023,
    arXiv:2305.13245.

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
    return _attention(q, k, v)
