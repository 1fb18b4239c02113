"""Attention on Hopper GPUs through Mosaic: WGMMA on tiles that the copy engine brings."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fnml.pallas_kernels._compiler import cuda_params
from fnml.pallas_kernels._hopper import Stream, Transposed, div, fetch, product, pump
from fnml.pallas_kernels.attention._blocks import CUDA, ROWS
from fnml.pallas_kernels.attention._gpu_tiles import COMPUTE, hidden, reach
from fnml.pallas_kernels.attention._tiles import Extras, Plan

_LOG2E = math.log2(math.e)


def forward(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras, *, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """Return the output [B, T, H, D] and each row's log of its sum of exponentials [B, H, T]."""
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    blocks = CUDA[D]
    pair = ROWS * COMPUTE

    def kernel(q_ref, k_ref, v_ref, out_ref, log_ref, q_tile, log_tile, keys, values, ready):
        b, h, i, wg = (lax.axis_index(name) for name in ("batch", "head", "tile", "wg"))
        n = div(h, H // K)
        first, stop = reach(plan, i * pair, pair, blocks.k, S // blocks.k)
        keys, values, steps = Stream(*keys), Stream(*values), stop - first

        @pl.when(wg < COMPUTE)
        def _() -> None:
            plgpu.set_max_registers(232, action="increase")
            start = i * pair + wg * ROWS
            mine = q_tile.at[wg]
            fetch([(q_ref.at[b, pl.ds(start, ROWS), h], mine)], ready.at[wg])

            def step(x: Any, carry: tuple) -> tuple:
                acc, top, total = carry
                scores = product(mine, Transposed(keys.take(x)), interpret=interpret)
                keys.give_back(x, steps)
                scores = hidden(plan, scores, start, (first + x) * blocks.k)
                # In units of log 2, which is what the hardware's exponential takes.
                unit = plan.scale * _LOG2E
                now = jnp.maximum(top, scores.max(1) * unit)
                level = now if plan.left is None else jnp.where(now == -jnp.inf, 0.0, now)
                weights = jnp.exp2(scores * unit - lax.broadcast_in_dim(level, scores.shape, [0]))
                shrink = jnp.exp2(top - level)
                total = total * shrink + weights.sum(1)
                acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
                value = values.take(x)
                acc = product(weights.astype(q.dtype), value, acc, interpret=interpret)
                values.give_back(x, steps)
                return acc, now, total

            carry = (
                jnp.zeros((ROWS, D), jnp.float32),
                jnp.full((ROWS,), -jnp.inf, jnp.float32),
                jnp.zeros((ROWS,), jnp.float32),
            )
            acc, top, total = lax.fori_loop(0, steps, step, carry)
            alone = total == 0.0
            sums = jnp.where(alone, 1.0, total)
            mine[...] = (acc / lax.broadcast_in_dim(sums, acc.shape, [0])).astype(q.dtype)
            log = top * (1 / _LOG2E) + jnp.log(sums)
            log_tile.at[wg][...] = jnp.where(alone, jnp.inf, log)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, out_ref.at[b, pl.ds(start, ROWS), h])
            plgpu.copy_smem_to_gmem(log_tile.at[wg], log_ref.at[b, h, pl.ds(start, ROWS)])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == COMPUTE)
        def _() -> None:
            plgpu.set_max_registers(40, action="decrease")

            def source(ref: Any) -> Any:
                return lambda x: ref.at[b, pl.ds((first + x) * blocks.k, blocks.k), n]

            pump([(keys, source(k_ref)), (values, source(v_ref))], steps)

    out, log = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, H, T), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((COMPUTE, ROWS, D), q.dtype),
            plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
            tuple(Stream.scratch((blocks.k, D), q.dtype)),
            tuple(Stream.scratch((blocks.k, D), q.dtype)),
            plgpu.Barrier(num_barriers=COMPUTE),
        ],
        grid=(H, T // pair, B),
        grid_names=("head", "tile", "batch"),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        compiler_params=cuda_params(warpgroup=True),
        interpret=interpret,
    )(q, k, v)
    return out, log
