"""Attention on TPUs: online softmax over tiles of keys."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fnml.pallas_kernels.attention._blocks import tpu_blocks
from fnml.pallas_kernels.attention._cost import cost
from fnml.pallas_kernels.attention._tiles import Extras, Plan
from fnml.pallas_kernels.attention._tpu_tiles import (
    call,
    dot,
    heads_first,
    operands,
    tile_layout,
    tile_scores,
)


def forward(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras, *, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """Return the output [B, T, H, D] and each row's log of its sum of exponentials [B, H, T]."""
    B, T, H, D = q.shape
    blocks = tpu_blocks(D, q.dtype)
    layout = tile_layout(plan, q, k, blocks.q, blocks.k)

    def place(b: Any, h: Any, i: Any, j: Any) -> tuple[Any, Any, Any, Any]:
        # A tile of keys out of reach is not loaded: the step is told to stay at the last one.
        return b, h, i, jnp.clip(j, *layout.columns_of(i))

    def kernel(refs: dict[str, Any]) -> None:
        b, h, i, j = (pl.program_id(axis) for axis in range(4))
        top, total, acc = refs["top"], refs["total"], refs["acc"]

        @pl.when(j == 0)
        def _() -> None:
            top[...] = jnp.full(top.shape, -jnp.inf, jnp.float32)
            total[...] = jnp.zeros(total.shape, jnp.float32)
            acc[...] = jnp.zeros(acc.shape, jnp.float32)

        @pl.when(layout.visible(i, j))
        def _() -> None:
            scores, _, keep = tile_scores(layout, refs, b, h, i, j)
            now = jnp.maximum(top[...], scores.max(1, keepdims=True))
            level = jnp.where(now == -jnp.inf, 0.0, now)
            weights, shrink = jnp.exp(scores - level), jnp.exp(top[...] - level)
            total[...] = total[...] * shrink + weights.sum(1, keepdims=True)
            if keep is not None:
                weights = jnp.where(keep, weights * (1 / (1 - plan.rate)), 0.0)
            value = refs["v"][0, 0]
            acc[...] = acc[...] * shrink + dot(weights.astype(value.dtype), value, 1, 0)
            top[...] = now

        @pl.when(j == layout.columns - 1)
        def _() -> None:
            alone = total[...] == 0.0
            sums = jnp.where(alone, 1.0, total[...])
            refs["out"][0, 0] = (acc[...] / sums).astype(refs["out"].dtype)
            log = jnp.where(alone, jnp.inf, top[...] + jnp.log(sums))
            refs["log"][0, 0] = jnp.transpose(log)

    arrays = {
        "q": heads_first(q, layout.T),
        "k": heads_first(k, layout.S),
        "v": heads_first(v, layout.S),
    }
    outs = {
        "out": (
            jax.ShapeDtypeStruct((B, H, layout.T, D), q.dtype),
            pl.BlockSpec((1, 1, layout.q, D), lambda b, h, i, j: (b, h, i, 0)),
        ),
        "log": (
            jax.ShapeDtypeStruct((B, H, 1, layout.T), jnp.float32),
            pl.BlockSpec((1, 1, 1, layout.q), lambda b, h, i, j: (b, h, 0, i)),
        ),
    }
    scratch = {"top": (layout.q, 1), "total": (layout.q, 1), "acc": (layout.q, D)}
    got = call(
        kernel,
        operands(layout, place, arrays, extras),
        (B, H, layout.rows, layout.columns),
        outs,
        scratch,
        ("parallel", "parallel", "parallel", "arbitrary"),
        cost("forward", plan, q.shape, k.shape, q.dtype.itemsize),
        interpret,
    )
    return got["out"][:, :, :T].transpose(0, 2, 1, 3), got["log"][:, :, 0, :T]
