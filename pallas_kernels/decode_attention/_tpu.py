"""The kernel for TPUs: the pages that a sequence has, one after another.

Lengths and page numbers are prefetched scalars: they choose what the next block is while this one
is computed. Blocks beyond a sequence's length are neither fetched nor computed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fnml.pallas_kernels.decode_attention import _tiles
from fnml.pallas_kernels.decode_attention._blocks import VMEM_LIMIT, tpu_block
from fnml.pallas_kernels.decode_attention._cost import cost
from fnml.pallas_kernels.decode_attention._operands import Operands, Options


def _body(
    lengths_ref: Any,
    table_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    t: int,
    K: int,
    options: Options,
) -> None:
    *scale_refs, out_ref, top_ref, total_ref, sum_ref = refs
    rows, (columns, D) = q_ref.shape[1], k_ref.shape[1:]
    length = lengths_ref[pl.program_id(0)]
    index = pl.program_id(1)
    start = index * (columns // K)

    @pl.when(index == 0)
    def _() -> None:
        top_ref[...] = jnp.full_like(top_ref, -1e30)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(start < length)
    def _() -> None:
        q = q_ref[0]
        k = k_ref[0].astype(q.dtype)
        # Weights of 0 do not undo what is not finite in memory never written.
        end = (length - start) * K
        written = lax.broadcasted_iota(jnp.int32, (columns, D), 0) < end
        v = jnp.where(written, v_ref[0].astype(jnp.float32), 0.0).astype(q.dtype)
        k_scale = v_scale = None
        if scale_refs:
            known = lax.broadcasted_iota(jnp.int32, scale_refs[0].shape[1:], 1) + start < length
            k_scale, v_scale = (
                _tiles.by_column(jnp.where(known, ref[0], 0.0)) for ref in scale_refs
            )
        scores = _tiles.scores(q, k, k_scale, options.soft_cap)
        seen = _tiles.seen(rows, columns, t, K, start, length, options.window)
        state = (top_ref[...], total_ref[...], sum_ref[...])
        top_ref[...], total_ref[...], sum_ref[...] = _tiles.add(state, scores, seen, v, v_scale)

    @pl.when(index == pl.num_programs(1) - 1)
    def _() -> None:
        total = total_ref[...]
        out = sum_ref[...] / jnp.where(total == 0, 1.0, total)
        out_ref[0] = out.astype(out_ref.dtype)


def forward(operands: Operands, *, options: Options, interpret: Any = False) -> jax.Array:
    """Return what the queries read, [B, t, H, D]."""
    q, k, v, lengths, table, *scales = operands
    (B, t, H, D), K, S = q.shape, k.shape[2], operands.length
    size = k.shape[1] if table is not None else tpu_block(S, K, D, k.dtype.itemsize)
    blocks = pl.cdiv(S, size)
    numbers = jnp.zeros((1, 1), jnp.int32) if table is None else table.astype(jnp.int32)

    def where(b: Any, i: Any, lengths: Any, numbers: Any) -> tuple[Any, Any]:
        # Beyond the length the same block is named again, which fetches nothing.
        i = jnp.clip(i, 0, jnp.maximum(lax.div(lengths[b] + size - 1, size) - 1, 0))
        if table is None:
            return b, i
        return jnp.clip(numbers[b, i], 0, k.shape[0] - 1), 0

    def of_cache(b: Any, i: Any, lengths: Any, numbers: Any) -> tuple[Any, Any, int]:
        page, block = where(b, i, lengths, numbers)
        return page, block, 0

    def of_scales(b: Any, i: Any, lengths: Any, numbers: Any) -> tuple[Any, int, Any]:
        page, block = where(b, i, lengths, numbers)
        return page, 0, block

    cache = pl.BlockSpec((1, size * K, D), of_cache)
    queries = pl.BlockSpec((1, t * H, D), lambda b, i, *_: (b, 0, 0))
    present = [scale.astype(jnp.float32) for scale in scales if scale is not None]
    estimate = cost(B, t, H, K, D, S, q.dtype.itemsize, k.dtype.itemsize)
    out = pl.pallas_call(
        functools.partial(_body, t=t, K=K, options=options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, blocks),
            in_specs=[
                queries,
                cache,
                cache,
                *[pl.BlockSpec((1, K, size), of_scales)] * len(present),
            ],
            out_specs=queries,
            scratch_shapes=[
                pltpu.VMEM((t * H, 1), jnp.float32),
                pltpu.VMEM((t * H, 1), jnp.float32),
                pltpu.VMEM((t * H, D), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((B, t * H, D), q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(**estimate._asdict()),
        interpret=interpret,
        name="decode_attention",
    )(
        lengths.astype(jnp.int32),
        numbers,
        (q * D**-0.5).reshape(B, t * H, D),
        # No copy where K fills the sublanes of a tile, 8.
        k.reshape(k.shape[0], -1, D),
        v.reshape(v.shape[0], -1, D),
        *present,
    )
    return out.reshape(B, t, H, D)
