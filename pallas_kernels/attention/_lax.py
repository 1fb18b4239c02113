"""Attention in blocks of queries, without a T x S array: the default on every platform."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fnml.pallas_kernels._dtypes import wide
from fnml.pallas_kernels._varying import zeros
from fnml.pallas_kernels.attention._blocks import lax_block
from fnml.pallas_kernels.attention._tiles import (
    Extras,
    Plan,
    both,
    cap,
    in_window,
    kept,
    through_cap,
)

_MOST_SEGMENTS = 8


class _Segment(NamedTuple):
    """``blocks`` runs of ``block`` queries from ``start``; each reads ``span`` keys.

    They are the keys from 0, or from ``reach`` before the block's first query where that is given.
    """

    start: int
    blocks: int
    block: int
    span: int
    reach: int | None = None

    def split(self, x: jax.Array) -> jax.Array:
        """Cut this segment out of [B, K, G, T, D], as [blocks, B, K, G * block, D]."""
        B, K, G, _, D = x.shape
        x = x[:, :, :, self.start : self.start + self.blocks * self.block]
        x = x.reshape(B, K, G, self.blocks, self.block, D)
        return jnp.moveaxis(x, 3, 0).reshape(self.blocks, B, K, G * self.block, D)

    def join(self, x: jax.Array) -> jax.Array:
        """Undo :meth:`split`: [blocks, B, K, G * block, D] to [B, K, G, blocks * block, D]."""
        n, B, K, rows, D = x.shape
        x = x.reshape(n, B, K, rows // self.block, self.block, D)
        return jnp.moveaxis(x, 0, 3).reshape(B, K, -1, n * self.block, D)

    def first_key(self, index: jax.Array, S: int) -> jax.Array | int:
        """Return the first key that block ``index`` reads."""
        if self.reach is None:
            return 0
        return jnp.clip(self.start + index * self.block - self.reach, 0, S - self.span)

    def keys(self, x: jax.Array, first: jax.Array | int, axis: int = 2) -> jax.Array:
        """Cut the keys from ``first`` out of an axis."""
        if self.reach is None:
            return lax.slice_in_dim(x, 0, self.span, axis=axis)
        return lax.dynamic_slice_in_dim(x, first, self.span, axis)

    def tile(self, x: jax.Array, index: jax.Array, first: jax.Array | int) -> jax.Array:
        """Cut one block's tile out of [..., T | 1, S | 1]."""
        if x.shape[-2] != 1:
            start = self.start + index * self.block
            x = lax.dynamic_slice_in_dim(x, start, self.block, x.ndim - 2)
        return x if x.shape[-1] == 1 else self.keys(x, first, x.ndim - 1)


def _segments(plan: Plan, T: int, S: int, block: int | None) -> list[_Segment]:
    """Cut T queries into at most eight unrolled segments of looped blocks, and a remainder.

    Where queries see the keys up to their own, up to 1,024 of them each segment is one block.
    Beyond that the blocks of a segment run in a loop, which keeps both the memory and the size of
    the program linear in T; what the first blocks of a segment read in vain is at most a
    sixteenth of the T x T pairs. With a window each block cuts out the keys in its reach.
    """
    block = block or lax_block(T)
    full = T // block
    rest = T - full * block
    growing = plan.left is None and plan.right is not None
    per = max(1, -(-full // _MOST_SEGMENTS) if growing else full)
    cuts = [(i * block, min(per, full - i), block) for i in range(0, full, per)]
    cuts += [(full * block, 1, rest)] if rest else []
    segments = []
    for start, blocks, size in cuts:
        stop = start + blocks * size
        span, before = S if plan.right is None else min(S, stop + plan.right), None
        if plan.left is not None and plan.right is not None:
            within = size + plan.left + plan.right
            span, before = (within, plan.left) if within < S else (span, None)
        segments.append(_Segment(start, blocks, size, span, before))
    return segments


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


def _group_extra(x: jax.Array | None, K: int) -> jax.Array | None:
    """[B | 1, H | 1, T | 1, S | 1] to [B | 1, K | 1, G | 1, T | 1, S | 1]."""
    if x is None:
        return None
    B, H, T, S = x.shape
    return x.reshape(B, *((1, 1) if H == 1 else (K, H // K)), T, S)


class _Scores(NamedTuple):
    """One block's scores [B, K, G * block, span], and what led to them."""

    scores: jax.Array
    capped: jax.Array
    keep: jax.Array | None


def _scores(
    plan: Plan,
    extras: Extras,
    segment: _Segment,
    index: jax.Array,
    first: jax.Array | int,
    q: jax.Array,
    k: jax.Array,
) -> _Scores:
    """Return the scores of one block of scaled queries; -inf where a key is not seen."""
    B, K, rows, _ = q.shape
    G = rows // segment.block
    capped = cap(plan, _dot(q, k, 3, 3, wide(q.dtype)))
    # Row r of a block holds query r % block: the G heads of a group lie one after another.
    query = segment.start + index * segment.block + jnp.arange(rows) % segment.block
    key = first + jnp.arange(segment.span)
    seen = in_window(plan, query[:, None], key[None, :])
    seen = None if seen is None else seen[None, None]

    def flat(x: jax.Array) -> jax.Array:
        """Bring a tile [B | 1, K | 1, G | 1, block | 1, span | 1] to the scores' shape."""
        five = (B, K, G, segment.block, segment.span)
        return jnp.broadcast_to(x, five).reshape(capped.shape)

    scores = capped
    if extras.bias is not None:
        scores = scores + flat(segment.tile(extras.bias, index, first)).astype(scores.dtype)
    if extras.q_segments is not None and extras.k_segments is not None:
        own = extras.q_segments[:, None, None, :, None]
        own = segment.tile(own, index, first)
        other = segment.keys(extras.k_segments, first, 1)[:, None, None, None, :]
        seen = both(seen, flat(own == other))
    if extras.mask is not None:
        seen = both(seen, flat(segment.tile(extras.mask, index, first)))
    if seen is not None:
        scores = jnp.where(seen, scores, -jnp.inf)
    keep = None
    if extras.seed is not None:
        heads = jnp.arange(B * K * G, dtype=jnp.int32).reshape(B, K, G)
        heads = jnp.repeat(heads, segment.block, axis=2)[..., None]
        query = query.astype(jnp.int32)[None, None, :, None]
        keep = kept(plan, extras.seed, heads, query, key.astype(jnp.int32)[None, None, None])
    return _Scores(scores, capped, keep)


def forward(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    block_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the output [B, T, H, D] and each row's log of its sum of exponentials [B, H, T].

    The latter is infinite for a query that sees no key; its output is 0.
    """
    B, T, H, _ = q.shape
    K, S = k.shape[2], k.shape[1]
    dtype, sums = q.dtype, wide(q.dtype)
    grouped = _group(q, K) * plan.scale  # [B, K, G, T, D]
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, K, S, D]
    hides = extras.may_hide_all or plan.left is not None
    extras = extras._replace(bias=_group_extra(extras.bias, K), mask=_group_extra(extras.mask, K))
    outs, logs = [], []
    for segment in _segments(plan, T, S, block_size):

        def block(_, inputs, segment=segment):
            index, q = inputs
            first = segment.first_key(index, S)
            k, v = segment.keys(keys, first), segment.keys(values, first)
            scores, _, keep = _scores(plan, extras, segment, index, first, q, k)
            top = scores.max(-1, keepdims=True)
            if hides:
                top = jnp.where(top == -jnp.inf, 0, top)
            weights = jnp.exp(scores - top)
            total = weights.sum(-1, keepdims=True)
            log = top + jnp.log(total)
            if hides:
                log = jnp.where(total == 0, jnp.inf, log)
                total = jnp.where(total == 0, 1, total)
            if keep is not None:
                weights = jnp.where(keep, weights * (1 / (1 - plan.rate)), 0)
            out = _dot(weights.astype(dtype), v, 3, 2, sums) / total  # [B, K, G * block, D]
            return None, (out.astype(dtype), log)

        indices = jnp.arange(segment.blocks)
        _, (out, log) = lax.scan(block, None, (indices, segment.split(grouped)))
        outs.append(segment.join(out))
        logs.append(segment.join(log))
    out, log = jnp.concatenate(outs, 3), jnp.concatenate(logs, 3)
    return _ungroup(out), log.reshape(B, H, T)


def backward(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    out: jax.Array,
    log: jax.Array,
    grad: jax.Array,
    block_size: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Return the gradients of q, k, v and the bias."""
    K, (B, S) = k.shape[2], k.shape[:2]
    dtype, sums = q.dtype, wide(q.dtype)
    T, H = q.shape[1:3]
    grouped = _group(q, K) * plan.scale
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    out, grad = _group(out, K), _group(grad, K)
    log = log.reshape(B, K, H // K, T, 1)
    extras = extras._replace(bias=_group_extra(extras.bias, K), mask=_group_extra(extras.mask, K))
    # sum(P * dP) over the keys, which the softmax's VJP needs, equals sum(out * grad) over D.
    inner = (out.astype(sums) * grad.astype(sums)).sum(-1, keepdims=True)
    grad_q = []
    grad_k, grad_v = jnp.zeros(keys.shape, sums), jnp.zeros(values.shape, sums)
    grad_bias = None if extras.bias is None else zeros(extras.bias.shape, sums, grad)
    for segment in _segments(plan, T, S, block_size):

        def block(carry, inputs, segment=segment):
            index, q, g, inner, log = inputs
            first = segment.first_key(index, S)
            k, v = segment.keys(keys, first), segment.keys(values, first)
            scores, capped, keep = _scores(plan, extras, segment, index, first, q, k)
            weights = jnp.exp(scores - log)  # [B, K, G * block, span]
            slope, used = _dot(g, v, 3, 3, sums), weights
            if keep is not None:
                factor = 1 / (1 - plan.rate)
                slope, used = (jnp.where(keep, x * factor, 0) for x in (slope, used))
            slope = weights * (slope - inner)
            more_k, more_v, more_bias = carry
            if more_bias is not None:
                more_bias = _add_bias(segment, index, first, more_bias, slope)
            slope = through_cap(plan, capped, slope).astype(dtype)
            more_k = _add_keys(segment, more_k, first, _dot(slope, q, 2, 2, sums))
            more_v = _add_keys(segment, more_v, first, _dot(used.astype(dtype), g, 2, 2, sums))
            return (more_k, more_v, more_bias), _dot(slope, k, 3, 2, sums)

        # Without a window each segment adds to as many keys as it reads, then to the whole.
        size = S if segment.reach is not None else segment.span
        nothing = zeros((*keys.shape[:2], size, keys.shape[3]), sums, grad)
        blocks = (segment.split(x) for x in (grouped, grad, inner, log))
        (more_k, more_v, grad_bias), part = lax.scan(
            block, (nothing, nothing, grad_bias), (jnp.arange(segment.blocks), *blocks)
        )
        grad_q.append(segment.join(part))
        grad_k = grad_k.at[:, :, :size].add(more_k)
        grad_v = grad_v.at[:, :, :size].add(more_v)
    scaled = jnp.concatenate(grad_q, 3) * plan.scale
    back_k, back_v = grad_k.transpose(0, 2, 1, 3), grad_v.transpose(0, 2, 1, 3)
    if grad_bias is not None:
        A, N, M, *rest = grad_bias.shape
        grad_bias = grad_bias.reshape(A, N * M, *rest)
    return _ungroup(scaled).astype(dtype), back_k.astype(dtype), back_v.astype(dtype), grad_bias


def _add_keys(
    segment: _Segment, total: jax.Array, first: jax.Array | int, part: jax.Array
) -> jax.Array:
    """Add [B, K, span, D] to the keys from ``first``."""
    if segment.reach is None:
        return total + part
    old = lax.dynamic_slice_in_dim(total, first, segment.span, 2)
    return lax.dynamic_update_slice_in_dim(total, old + part, first, 2)


def _add_bias(
    segment: _Segment,
    index: jax.Array,
    first: jax.Array | int,
    total: jax.Array,
    slope: jax.Array,
) -> jax.Array:
    """Add one block's slopes [B, K, G * block, span] to the bias' gradient, summed to its shape."""
    B, K, rows, span = slope.shape
    slope = slope.reshape(B, K, rows // segment.block, segment.block, span)
    over = [axis for axis, size in enumerate(total.shape) if size == 1]
    slope = slope.sum(over, keepdims=True)
    query = 0 if total.shape[3] == 1 else segment.start + index * segment.block
    corner = (0, 0, 0, query, 0 if total.shape[4] == 1 else first)
    start = tuple(jnp.asarray(i, jnp.int32) for i in corner)
    old = lax.dynamic_slice(total, start, slope.shape)
    return lax.dynamic_update_slice(total, old + slope, start)
