"""Attention: Attention and FlexAttention, RotaryEmbedding, and the layers of their blocks."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnml.interop.onnx._dtypes import DTYPES, canonical
from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._static import align, axis_of, traced


def _scores(query: Any, key: Any, scale: float) -> Any:
    """Multiply ``[B, H, T, D]`` with ``[B, K, S, D]`` of the group's shared head: ``[B, H, T, S]``.

    Both factors take the root of the scale, so that half precision does not overflow.
    """
    b, h, t, d = query.shape
    k = key.shape[1]
    root = scale**0.5
    grouped = (query * root).reshape(b, k, h // k, t, d)
    return jnp.einsum("bkgtd,bksd->bkgts", grouped, key * root).reshape(b, h, t, -1)


def _values(probs: Any, value: Any) -> Any:
    """Average the values ``[B, K, S, D]`` by ``[B, H, T, S]``: ``[B, H, T, D]``."""
    b, h, t, s = probs.shape
    k = value.shape[1]
    grouped = probs.reshape(b, k, h // k, t, s)
    return jnp.einsum("bkgts,bksd->bkgtd", grouped, value).reshape(b, h, t, -1)


def _softmax(scores: Any) -> Any:
    """Return softmax over the last axis; a row that is masked as a whole becomes zero."""
    top = lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(jnp.isneginf(top), 0, top))
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)


def _split_heads(x: Any, heads: int) -> Any:
    """Turn ``[B, T, H*D]`` into ``[B, H, T, D]``."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def _visible(node: Node, queries: int, keys: int, past: int, lengths: Any) -> Any:
    """Tell which keys each query sees, ``[B or 1, 1, T, S]``; ``None`` where it sees them all.

    A query's own position is ``offset`` after its place: behind the cached keys.
    """
    get = node.attributes.get
    causal = bool(get("is_causal", 0))
    left, right = get("left_window_size", -1), get("right_window_size", -1)
    if causal:
        right = 0 if right < 0 else min(right, 0)
    place = jnp.arange(keys, dtype=jnp.int32)[None, None, None]
    offset = jnp.full((1, 1, 1, 1), past, jnp.int32)
    seen = []
    if lengths is not None:
        lengths = lengths.astype(jnp.int32).reshape(-1, 1, 1, 1)
        offset = offset if past else lengths - queries
        seen.append(jnp.broadcast_to(place < lengths, (lengths.shape[0], 1, queries, keys)))
    own = offset + jnp.arange(queries, dtype=jnp.int32)[None, None, :, None]
    if right >= 0:
        seen.append(place <= own + right)
    if left >= 0:
        seen.append(place >= own - left)
    out = None
    for keep in seen:
        out = keep if out is None else out & keep
    return out


def _masked(scores: Any, mask: Any, visible: Any) -> Any:
    """Add a mask of floats, or -inf where one of booleans or ``visible`` forbids."""
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        missing = scores.shape[-1] - mask.shape[-1]
        boolean = mask.dtype == jnp.bool_
        if missing > 0 and mask.shape[-1] > 1:
            fill = jnp.asarray(False if boolean else -jnp.inf, mask.dtype)
            mask = lax.pad(mask, fill, [(0, 0, 0)] * 3 + [(0, missing, 0)])
        if boolean:
            scores = jnp.where(mask, scores, -jnp.inf)
        else:
            scores = scores + mask.astype(scores.dtype)
    return scores if visible is None else jnp.where(visible, scores, -jnp.inf)


def _attention(
    node: Node,
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    past_key: Any = None,
    past_value: Any = None,
    lengths: Any = None,
) -> tuple[Any, ...]:
    values = traced(node, query, key, value, mask, past_key, past_value, lengths)
    query, key, value, mask, past_key, past_value, lengths = values
    get = node.attributes.get
    flat = query.ndim == 3
    if flat:
        query = _split_heads(query, node.attributes["q_num_heads"])
        key, value = (_split_heads(x, node.attributes["kv_num_heads"]) for x in (key, value))
    past = 0
    if past_key is not None:
        past = past_key.shape[2]
        key = jnp.concatenate([past_key, key], axis=2)
        value = jnp.concatenate([past_value, value], axis=2)
    dtype = query.dtype
    scale = get("scale")
    raw = _scores(query, key, query.shape[-1] ** -0.5 if scale is None else scale)
    cap = get("softcap", 0.0)
    capped = cap * jnp.tanh(raw / cap) if cap else raw
    visible = _visible(node, query.shape[2], key.shape[2], past, lengths)
    biased = _masked(capped, mask, visible)
    precision = get("softmax_precision")
    exact = canonical(DTYPES[precision]) if precision else dtype
    probs = _softmax(biased.astype(exact)).astype(dtype)
    y = _values(probs, value.astype(dtype))
    if flat:
        y = y.swapaxes(1, 2).reshape(y.shape[0], y.shape[2], -1)
    shown = (raw, capped, biased, probs)[get("qk_matmul_output_mode", 0)]
    return y, key, value, shown


def _flex_attention(node: Node, query: Any, key: Any, value: Any) -> Any:
    query, key, value = traced(node, query, key, value)
    get = node.attributes.get
    scale, precision = get("scale"), get("softmax_precision")
    usual = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    exact = canonical(DTYPES[precision]) if precision else usual

    def modified(name: str, x: Any) -> Any:
        return node.outer.run(get(name), x)[0] if get(name) is not None else x

    wide = query.astype(exact), key.astype(exact), value.astype(exact)
    scores = _scores(*wide[:2], query.shape[-1] ** -0.5 if scale is None else scale)
    probs = _softmax(traced(node, modified("score_mod", scores))[0])
    return _values(traced(node, modified("prob_mod", probs))[0], wide[2]).astype(query.dtype)


def _rotary_embedding(node: Node, x: Any, cos: Any, sin: Any, places: Any = None) -> Any:
    x, cos, sin, places = traced(node, x, cos, sin, places)
    get = node.attributes.get
    heads = x if x.ndim == 4 else _split_heads(x, node.attributes["num_heads"])
    if places is not None:
        cos, sin = cos[places], sin[places]
    cos, sin = cos[:, None], sin[:, None]
    size = get("rotary_embedding_dim", 0) or heads.shape[-1]
    turned, rest = heads[..., :size], heads[..., size:]
    if get("interleaved", 0):
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = jnp.split(turned, 2, axis=-1)
    pair = cos * a - sin * b, sin * a + cos * b
    if get("interleaved", 0):
        turned = jnp.stack(pair, axis=-1).reshape(turned.shape)
    else:
        turned = jnp.concatenate(pair, axis=-1)
    out = jnp.concatenate([turned, rest], axis=-1)
    return out if x.ndim == 4 else out.swapaxes(1, 2).reshape(x.shape)


def _rms_normalization(node: Node, x: Any, scale: Any) -> Any:
    x, scale = traced(node, x, scale)
    first = axis_of(node, node.attributes.get("axis", -1), x.ndim)
    wide = x.astype(canonical(DTYPES[node.attributes.get("stash_type", 1)]))
    square = jnp.mean(wide * wide, axis=tuple(range(first, x.ndim)), keepdims=True)
    normal = wide * lax.rsqrt(square + node.attributes.get("epsilon", 1e-5))
    y, scale = align(node, normal.astype(x.dtype).astype(scale.dtype), scale)
    return y * scale


def _swiglu(node: Node, gate: Any, x: Any) -> Any:
    gate, x = traced(node, gate, x)
    return gate * jax.nn.sigmoid(node.attributes.get("alpha", 1.0) * gate) * x


OPERATORS: Mapping[str, Operator] = {
    "Attention": _attention,
    "RMSNormalization": _rms_normalization,
    "RotaryEmbedding": _rotary_embedding,
    "SwiGLU": _swiglu,
    "ai.onnx.preview.FlexAttention": _flex_attention,
}
