"""The gradients of attention on TPUs: one kernel for queries, one for keys and values."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from fnml.pallas_kernels._cost import Cost
from fnml.pallas_kernels.attention._blocks import tpu_blocks
from fnml.pallas_kernels.attention._cost import cost
from fnml.pallas_kernels.attention._tiles import Extras, Plan, through_cap
from fnml.pallas_kernels.attention._tpu_tiles import (
    Layout,
    call,
    column,
    dot,
    heads_first,
    operands,
    pad,
    tile_layout,
    tile_scores,
)


def _slopes(layout: Layout, refs: dict[str, Any], b: Any, h: Any, i: Any, j: Any) -> tuple:
    """Return one tile's used weights and the slopes of its scores, before and after the cap."""
    plan = layout.plan
    scores, capped, keep = tile_scores(layout, refs, b, h, i, j)
    weights = jnp.exp(scores - column(refs["log"][0, 0]))
    slope, used = dot(refs["grad"][0, 0], refs["v"][0, 0], 1, 1), weights
    if keep is not None:
        factor = 1 / (1 - plan.rate)
        slope, used = (jnp.where(keep, x * factor, 0.0) for x in (slope, used))
    outer = weights * (slope - column(refs["inner"][0, 0]))
    return used, outer, through_cap(plan, capped, outer)


def backward(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    out: jax.Array,
    log: jax.Array,
    grad: jax.Array,
    *,
    interpret: Any,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Return the gradients of q, k, v and the bias."""
    T, S = q.shape[1], k.shape[1]
    blocks = tpu_blocks(q.shape[3], q.dtype)
    layout = tile_layout(plan, q, k, blocks.q_back, blocks.k_back)
    inner = (out.astype(jnp.float32) * grad.astype(jnp.float32)).sum(-1).transpose(0, 2, 1)
    arrays = {
        "q": heads_first(q, layout.T),
        "k": heads_first(k, layout.S),
        "v": heads_first(v, layout.S),
        "grad": heads_first(grad, layout.T),
        # Rows of padding weigh nothing: exp(score - inf).
        "log": pad(log, 2, layout.T, jnp.inf)[:, :, None],
        "inner": pad(inner, 2, layout.T)[:, :, None],
    }
    back_q, back_bias = _backward_q(layout, arrays, extras, interpret)
    back_k, back_v = _backward_kv(layout, arrays, extras, interpret)
    back_q, back_k, back_v = (x.transpose(0, 2, 1, 3) for x in (back_q, back_k, back_v))
    if back_bias is not None:
        back_bias = back_bias[:, :, :T, :S]
    return back_q[:, :T], back_k[:, :S], back_v[:, :S], back_bias


def _cost(part: str, layout: Layout, arrays: dict[str, jax.Array]) -> Cost:
    (B, H, T, D), (_, K, S, _) = arrays["q"].shape, arrays["k"].shape
    return cost(part, layout.plan, (B, T, H, D), (B, S, K, D), arrays["q"].dtype.itemsize)


def _backward_q(
    layout: Layout, arrays: dict[str, jax.Array], extras: Extras, interpret: Any
) -> tuple[jax.Array, jax.Array | None]:
    """Return the gradients of q [B, H, T, D] and of the bias, tile by tile of queries."""
    B, H, _, D = arrays["q"].shape

    def place(b: Any, h: Any, i: Any, j: Any) -> tuple[Any, Any, Any, Any]:
        return b, h, i, jnp.clip(j, *layout.columns_of(i))

    def kernel(refs: dict[str, Any]) -> None:
        b, h, i, j = (pl.program_id(axis) for axis in range(4))
        acc, visible = refs["acc"], layout.visible(i, j)

        @pl.when(j == 0)
        def _() -> None:
            acc[...] = jnp.zeros(acc.shape, jnp.float32)

        @pl.when(visible)
        def _() -> None:
            _, outer, slope = _slopes(layout, refs, b, h, i, j)
            key = refs["k"][0, 0]
            acc[...] += dot(slope.astype(key.dtype), key, 1, 0)
            if "back_bias" in refs:
                refs["back_bias"][0, 0] = outer

        if "back_bias" in refs:

            @pl.when(jnp.logical_not(visible))
            def clear() -> None:
                refs["back_bias"][0, 0] = jnp.zeros((layout.q, layout.k), jnp.float32)

        @pl.when(j == layout.columns - 1)
        def _() -> None:
            refs["back_q"][0, 0] = (acc[...] * layout.plan.scale).astype(refs["back_q"].dtype)

    outs = {
        "back_q": (
            jax.ShapeDtypeStruct((B, H, layout.T, D), arrays["q"].dtype),
            pl.BlockSpec((1, 1, layout.q, D), lambda b, h, i, j: (b, h, i, 0)),
        )
    }
    if extras.bias is not None:
        outs["back_bias"] = (
            jax.ShapeDtypeStruct((B, H, layout.T, layout.S), jnp.float32),
            pl.BlockSpec((1, 1, layout.q, layout.k), lambda b, h, i, j: (b, h, i, j)),
        )
    got = call(
        kernel,
        operands(layout, place, arrays, extras),
        (B, H, layout.rows, layout.columns),
        outs,
        {"acc": (layout.q, D)},
        ("parallel", "parallel", "parallel", "arbitrary"),
        _cost("queries", layout, arrays),
        interpret,
    )
    return got["back_q"], got.get("back_bias")


def _backward_kv(
    layout: Layout, arrays: dict[str, jax.Array], extras: Extras, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of k and v [B, K, S, D], tile by tile of keys.

    The innermost grid dimension runs through the tiles of queries of all heads of the group, so
    that one tile of the result is summed in place.
    """
    B, K, S, D = arrays["k"].shape
    group = layout.H // layout.K

    def stand(b: Any, n: Any, j: Any, x: Any) -> tuple[Any, Any, Any, Any]:
        rows = jnp.int32(layout.rows)
        return b, n * group + lax.div(x, rows), lax.rem(x, rows), j

    def place(b: Any, n: Any, j: Any, x: Any) -> tuple[Any, Any, Any, Any]:
        b, h, i, j = stand(b, n, j, x)
        return b, h, jnp.clip(i, *layout.rows_of(j)), j

    def kernel(refs: dict[str, Any]) -> None:
        step = [pl.program_id(axis) for axis in range(4)]
        b, h, i, j = stand(*step)
        acc_k, acc_v = refs["acc_k"], refs["acc_v"]

        @pl.when(step[3] == 0)
        def _() -> None:
            acc_k[...] = jnp.zeros(acc_k.shape, jnp.float32)
            acc_v[...] = jnp.zeros(acc_v.shape, jnp.float32)

        @pl.when(layout.visible(i, j))
        def _() -> None:
            used, _, slope = _slopes(layout, refs, b, h, i, j)
            query, grad = refs["q"][0, 0], refs["grad"][0, 0]
            acc_k[...] += dot(slope.astype(query.dtype), query, 0, 0)
            acc_v[...] += dot(used.astype(grad.dtype), grad, 0, 0)

        @pl.when(step[3] == group * layout.rows - 1)
        def _() -> None:
            dtype = refs["back_k"].dtype
            refs["back_k"][0, 0] = (acc_k[...] * layout.plan.scale).astype(dtype)
            refs["back_v"][0, 0] = acc_v[...].astype(dtype)

    shape = jax.ShapeDtypeStruct((B, K, S, D), arrays["k"].dtype)
    spec = pl.BlockSpec((1, 1, layout.k, D), lambda b, n, j, x: (b, n, j, 0))
    got = call(
        kernel,
        operands(layout, place, arrays, extras),
        (B, K, layout.columns, group * layout.rows),
        {"back_k": (shape, spec), "back_v": (shape, spec)},
        {"acc_k": (layout.k, D), "acc_v": (layout.k, D)},
        ("parallel", "parallel", "parallel", "arbitrary"),
        _cost("keys", layout, arrays),
        interpret,
    )
    return got["back_k"], got["back_v"]
