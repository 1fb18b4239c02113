"""The gradients of attention on Hopper GPUs: one kernel for queries, one for keys and values."""

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
from fnml.pallas_kernels.attention._gpu_tiles import COMPUTE, hidden, reach, reach_back
from fnml.pallas_kernels.attention._tiles import Extras, Plan

_LOG2E = math.log2(math.e)


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
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Return the gradients of q, k and v; this body takes no bias."""
    inner = (out.astype(jnp.float32) * grad.astype(jnp.float32)).sum(-1).transpose(0, 2, 1)
    rows = (log * _LOG2E, inner)  # [B, H, T]
    back_q = _backward_q(plan, q, k, v, grad, *rows, interpret)
    back_k, back_v = _backward_kv(plan, q, k, v, grad, *rows, interpret)
    return back_q, back_k, back_v, None


def _backward_q(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    grad: jax.Array,
    log: jax.Array,
    inner: jax.Array,
    interpret: Any,
) -> jax.Array:
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    blocks = CUDA[D]
    rows, pair = ROWS, ROWS * COMPUTE

    def kernel(q_ref, k_ref, v_ref, grad_ref, log_ref, inner_ref, back_ref, *scratch):
        q_tile, grad_tile, log_tile, inner_tile, keys, values, ready = scratch
        b, h, i, wg = (lax.axis_index(name) for name in ("batch", "head", "tile", "wg"))
        n = div(h, H // K)
        first, stop = reach(plan, i * pair, pair, blocks.k_back, S // blocks.k_back)
        keys, values, steps = Stream(*keys), Stream(*values), stop - first

        @pl.when(wg < COMPUTE)
        def _() -> None:
            plgpu.set_max_registers(232, action="increase")
            start = i * pair + wg * rows
            tiles = [tile.at[wg] for tile in (q_tile, grad_tile, log_tile, inner_tile)]
            place = (b, pl.ds(start, rows), h)
            line = (b, h, pl.ds(start, rows))
            refs = (q_ref.at[place], grad_ref.at[place], log_ref.at[line], inner_ref.at[line])
            fetch(list(zip(refs, tiles, strict=True)), ready.at[wg])
            query, slopes, level, mean = tiles[0], tiles[1], tiles[2][...], tiles[3][...]

            def step(x: Any, acc: jax.Array) -> jax.Array:
                key, value = keys.take(x), values.take(x)
                scores = product(query, Transposed(key), interpret=interpret)
                scores = hidden(plan, scores, start, (first + x) * blocks.k_back)
                unit = plan.scale * _LOG2E
                weights = jnp.exp2(scores * unit - lax.broadcast_in_dim(level, scores.shape, [0]))
                slope = product(slopes, Transposed(value), interpret=interpret)
                values.give_back(x, steps)
                slope = weights * (slope - lax.broadcast_in_dim(mean, slope.shape, [0]))
                acc = product(slope.astype(q.dtype), key, acc, interpret=interpret)
                keys.give_back(x, steps)
                return acc

            acc = lax.fori_loop(0, steps, step, jnp.zeros((rows, D), jnp.float32))
            query[...] = (acc * plan.scale).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(query, back_ref.at[place])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == COMPUTE)
        def _() -> None:
            plgpu.set_max_registers(40, action="decrease")

            def source(ref: Any) -> Any:
                return lambda x: ref.at[b, pl.ds((first + x) * blocks.k_back, blocks.k_back), n]

            pump([(keys, source(k_ref)), (values, source(v_ref))], steps)

    tile, line = plgpu.SMEM((COMPUTE, rows, D), q.dtype), plgpu.SMEM((COMPUTE, rows), jnp.float32)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=[
            tile,
            tile,
            line,
            line,
            tuple(Stream.scratch((blocks.k_back, D), q.dtype)),
            tuple(Stream.scratch((blocks.k_back, D), q.dtype)),
            plgpu.Barrier(num_barriers=COMPUTE),
        ],
        grid=(H, T // pair, B),
        grid_names=("head", "tile", "batch"),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        compiler_params=cuda_params(warpgroup=True),
        interpret=interpret,
    )(q, k, v, grad, log, inner)


def _backward_kv(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    grad: jax.Array,
    log: jax.Array,
    inner: jax.Array,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of k and v; the loop runs through the queries of the whole group.

    Scores are taken with keys as rows, so that each product finds its left side in registers.
    """
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    group, blocks = H // K, CUDA[D]
    rows, pair, many = ROWS, ROWS * COMPUTE, blocks.q_back

    def kernel(q_ref, k_ref, v_ref, grad_ref, log_ref, inner_ref, back_k, back_v, *scratch):
        k_tile, v_tile, queries, slopes, levels, means, ready = scratch
        b, n, j, wg = (lax.axis_index(name) for name in ("batch", "head", "tile", "wg"))
        first, stop = reach_back(plan, j * pair, pair, many, T // many)
        queries, slopes, levels, means = (Stream(*x) for x in (queries, slopes, levels, means))
        each = stop - first
        steps = each * group

        def position(x: Any) -> tuple[Any, Any]:
            """Return the head and the first query of a step."""
            return n * group + lax.div(x, each), (first + lax.rem(x, each)) * many

        @pl.when(wg < COMPUTE)
        def _() -> None:
            plgpu.set_max_registers(232, action="increase")
            start = j * pair + wg * rows
            place = (b, pl.ds(start, rows), n)
            key, value = k_tile.at[wg], v_tile.at[wg]
            fetch([(k_ref.at[place], key), (v_ref.at[place], value)], ready.at[wg])

            def step(x: Any, carry: tuple) -> tuple:
                acc_k, acc_v = carry
                _, at = position(x)
                query, slope = queries.take(x), slopes.take(x)
                scores = product(key, Transposed(query), interpret=interpret)
                scores = hidden(plan, scores, at, start, keys_first=True)
                level = levels.take(x)[...]
                levels.give_back(x, steps)
                unit = plan.scale * _LOG2E
                weights = jnp.exp2(scores * unit - lax.broadcast_in_dim(level, scores.shape, [1]))
                acc_v = product(weights.astype(q.dtype), slope, acc_v, interpret=interpret)
                back = product(value, Transposed(slope), interpret=interpret)
                slopes.give_back(x, steps)
                mean = means.take(x)[...]
                means.give_back(x, steps)
                back = weights * (back - lax.broadcast_in_dim(mean, back.shape, [1]))
                acc_k = product(back.astype(q.dtype), query, acc_k, interpret=interpret)
                queries.give_back(x, steps)
                return acc_k, acc_v

            zeros = jnp.zeros((rows, D), jnp.float32)
            acc_k, acc_v = lax.fori_loop(0, steps, step, (zeros, zeros))
            key[...] = (acc_k * plan.scale).astype(q.dtype)
            value[...] = acc_v.astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(key, back_k.at[place])
            plgpu.copy_smem_to_gmem(value, back_v.at[place])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == COMPUTE)
        def _() -> None:
            plgpu.set_max_registers(40, action="decrease")

            def tile(ref: Any) -> Any:
                def source(x: Any) -> Any:
                    h, at = position(x)
                    return ref.at[b, pl.ds(at, many), h]

                return source

            def line(ref: Any) -> Any:
                def source(x: Any) -> Any:
                    h, at = position(x)
                    return ref.at[b, h, pl.ds(at, many)]

                return source

            pairs = [(queries, tile(q_ref)), (slopes, tile(grad_ref))]
            pump([*pairs, (levels, line(log_ref)), (means, line(inner_ref))], steps)

    shape = jax.ShapeDtypeStruct(k.shape, k.dtype)
    own = plgpu.SMEM((COMPUTE, rows, D), q.dtype)
    return plgpu.kernel(
        kernel,
        out_type=[shape, shape],
        scratch_types=[
            own,
            own,
            tuple(Stream.scratch((many, D), q.dtype)),
            tuple(Stream.scratch((many, D), q.dtype)),
            tuple(Stream.scratch((many,), jnp.float32)),
            tuple(Stream.scratch((many,), jnp.float32)),
            plgpu.Barrier(num_barriers=COMPUTE),
        ],
        grid=(K, S // pair, B),
        grid_names=("head", "tile", "batch"),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        compiler_params=cuda_params(warpgroup=True),
        interpret=interpret,
    )(q, k, v, grad, log, inner)
