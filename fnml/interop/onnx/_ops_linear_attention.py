"""Layers with a running state: LinearAttention and CausalConvWithState."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnml.core import ConfigError
from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._static import traced, where_is

_RULES = ("linear", "gated", "delta", "gated_delta")


def _linear_attention(
    node: Node,
    query: Any,
    key: Any,
    value: Any,
    state: Any = None,
    decay: Any = None,
    beta: Any = None,
) -> tuple[Any, Any]:
    query, key, value, state, decay, beta = traced(node, query, key, value, state, decay, beta)
    get = node.attributes.get
    rule = get("update_rule", "gated_delta")
    gated, delta = rule in ("gated", "gated_delta"), rule in ("delta", "gated_delta")
    if rule not in _RULES or gated > (decay is not None) or delta > (beta is not None):
        raise ConfigError(
            f"{where_is(node)}: update_rule {rule!r} with decay {decay is not None} and beta "
            f"{beta is not None}; there are {', '.join(_RULES)}, the gated ones take a decay, the "
            "delta ones a beta"
        )
    heads, shared = node.attributes["q_num_heads"], node.attributes["kv_num_heads"]
    exact = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    batch = query.shape[0]

    def over_time(x: Any, count: int) -> Any:
        """Turn ``[B, T, count*D]`` into ``[T, B, count, D]``."""
        return x.astype(exact).reshape(*x.shape[:2], count, -1).swapaxes(0, 1)

    q, k, v = over_time(query, heads), over_time(key, shared), over_time(value, shared)
    size = k.shape[-1]
    scale = get("scale", 0.0) or size**-0.5
    start = (
        jnp.zeros((batch, shared, size, v.shape[-1]), exact)
        if state is None
        else state.astype(exact)
    )
    # A rule without decay keeps the state, one without beta writes all of it.
    keep = jnp.exp(over_time(decay, shared)) if gated else jnp.ones((q.shape[0], 1, 1, 1), exact)
    rate = over_time(beta, beta.shape[-1]) if delta else jnp.ones((q.shape[0], 1, 1, 1), exact)

    def body(memory: Any, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
        q, k, v, keep, rate = inputs
        memory = memory * keep[..., None]
        if delta:
            v = rate * (v - jnp.einsum("bhkv,bhk->bhv", memory, k))
        memory = memory + k[..., None] * v[..., None, :]
        grouped = q.reshape(batch, shared, heads // shared, size)
        return memory, jnp.einsum("bhgk,bhkv->bhgv", grouped, memory) * scale

    last, outputs = lax.scan(body, start, (q, k, v, keep, rate))
    y = outputs.swapaxes(0, 1).reshape(batch, query.shape[1], -1).astype(query.dtype)
    return y, last.astype(query.dtype if state is None else state.dtype)


def _causal_conv(
    node: Node, x: Any, weight: Any, bias: Any = None, state: Any = None
) -> tuple[Any, Any]:
    x, weight, bias, state = traced(node, x, weight, bias, state)
    taps = weight.shape[-1]
    if state is None:
        state = jnp.zeros((*x.shape[:2], taps - 1), x.dtype)
    line = jnp.concatenate([state.astype(x.dtype), x], axis=-1)
    y = lax.conv_general_dilated(line, weight, (1,), "VALID", feature_group_count=x.shape[1])
    if bias is not None:
        y = y + bias[None, :, None]
    if node.attributes.get("activation", "none") in ("silu", "swish"):
        y = jax.nn.silu(y)
    return y, line[..., line.shape[-1] - (taps - 1) :]


OPERATORS: Mapping[str, Operator] = {
    "CausalConvWithState": _causal_conv,
    "LinearAttention": _linear_attention,
}
