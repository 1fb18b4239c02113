"""The kernel for Hopper GPUs: each sequence's cache is cut into parts that are read side by side.

A block of threads reads one part of one sequence for one head of keys: one warpgroup copies tiles,
two take turns at computing with them. The few queries that read the head fill up a tile of 64 rows:
the tensor cores have nothing else to do while the next tile is on its way. XLA joins the parts.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fnml.pallas_kernels._compiler import cuda_params
from fnml.pallas_kernels._hopper import Stream, Transposed, div, product, pump
from fnml.pallas_kernels.decode_attention._blocks import (
    CUDA_ROWS,
    CUDA_TILE,
    cuda_parts,
    cuda_slots,
)
from fnml.pallas_kernels.decode_attention._operands import Operands, Options

_LOG2E = math.log2(math.e)

_READERS = 2
"""Warpgroups that compute. They divide the number of slots, so that a slot has one reader always."""


def forward(operands: Operands, *, options: Options, interpret: Any = False) -> jax.Array:
    """Return what the queries read, [B, t, H, D]."""
    q, k, v, lengths, table, *scales = operands
    (B, t, H, D), K = q.shape, k.shape[2]
    rows = t * (H // K)
    # The queries of one head of keys, token by token; the rest of the tile's rows are not kept.
    grouped = jnp.moveaxis(q.reshape(B, t, K, H // K, D), 2, 1).reshape(B, K, rows, D)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, CUDA_ROWS - rows), (0, 0)))
    present = [scale.astype(jnp.float32) for scale in scales if scale is not None]
    # Without pages, a table that nobody reads.
    numbers = jnp.zeros((1, 1), jnp.int32) if table is None else table.astype(jnp.int32)
    arrays = [lengths.astype(jnp.int32), numbers, grouped, k, v, *present]
    out, log = _parts(arrays, operands, options, t, rows, interpret)
    # A part without keys has a sum of exponentials of 0.
    top = jnp.max(log, axis=2, keepdims=True)
    weights = jnp.exp2(log - jnp.where(top == -jnp.inf, 0.0, top))
    total = jnp.sum(weights, axis=2)
    read = jnp.sum(weights[..., None] * out, axis=2) / jnp.where(total == 0, 1.0, total)[..., None]
    read = read[:, :, :rows].reshape(B, K, t, H // K, D)
    return jnp.moveaxis(read, 1, 2).reshape(B, t, H, D).astype(q.dtype)


def _parts(
    arrays: list[jax.Array],
    operands: Operands,
    options: Options,
    t: int,
    rows: int,
    interpret: Any,
) -> list[jax.Array]:
    """Return each part's output [B, K, parts, R, D] and log2 of its sums [B, K, parts, R]."""
    (B, _, _, D), (pages, page, K, _), S = operands.q.shape, operands.k.shape, operands.length
    paged, coded = operands.page_table is not None, operands.k_scale is not None
    group, dtype, kind = rows // t, operands.q.dtype, operands.k.dtype
    tile, tiles = CUDA_TILE, -(-S // CUDA_TILE)
    slots, count = cuda_slots(D, kind.itemsize), cuda_parts(B * K, tiles)
    # How a tile is copied: from as many pages as it needs.
    pieces = tile // page if paged and page < tile else 1
    kept = -(-rows // 8) * 8
    unit = D**-0.5 * (1.0 if options.soft_cap else _LOG2E)

    def kernel(*refs: Any) -> None:
        (lengths_ref, table_ref, q_ref, *caches), rest = refs[: len(arrays)], refs[len(arrays) :]
        out_ref, log_ref, q_tile, out_tiles, log_tiles, float_tiles, rings, ready = rest
        b, n, part, wg = (lax.axis_index(name) for name in ("batch", "head", "part", "wg"))
        keys, values, *lines = (Stream(*ring) for ring in rings)
        length = lengths_ref[b]
        # Every part has equally many of the tiles that the sequence's queries see.
        end = jnp.minimum(div(length + tile - 1, tile), tiles)
        first = jnp.int32(0)
        if options.window is not None:
            first = jnp.minimum(div(jnp.maximum(length - t - options.window + 1, 0), tile), end)
        each = div(end - first + count - 1, count)
        first = jnp.minimum(first + part * each, end)
        steps = jnp.minimum(first + each, end) - first

        def numbers(stored: Any) -> Any:
            """Return a tile that the tensor cores take."""
            if not coded:
                return stored
            floats = float_tiles.at[wg]
            # All warps have read what lies there before one of them overwrites it.
            plgpu.commit_smem()
            floats[...] = stored[...].astype(dtype)
            plgpu.commit_smem()
            return floats

        def scores_of(x: Any) -> jax.Array:
            start = (first + x) * tile
            stored = keys.take(x)
            scores = product(q_tile, Transposed(numbers(stored)), interpret=interpret) * unit
            keys.give_back(x, steps)
            if coded:
                scale = lines[0].take(x)[...]
                lines[0].give_back(x, steps)
                scores = scores * lax.broadcast_in_dim(scale, scores.shape, [1])
            if options.soft_cap is not None:
                scores = jnp.tanh(scores / options.soft_cap) * (options.soft_cap * _LOG2E)
            row = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0)
            key = start + plgpu.broadcasted_iota(jnp.int32, scores.shape, 1)
            query = length - t + (lax.div(row, jnp.int32(group)) if t > 1 else 0)
            seen = key <= query
            if options.window is not None:
                seen &= key > query - options.window
            return jnp.where(seen, scores, -jnp.inf)

        def step(turn: Any, carry: tuple) -> tuple:
            x, (acc, top, total) = turn * _READERS + wg, carry
            scores = scores_of(x)
            now = jnp.maximum(top, scores.max(1))
            level = jnp.where(now == -jnp.inf, 0.0, now)
            weights = jnp.exp2(scores - lax.broadcast_in_dim(level, scores.shape, [0]))
            shrink = jnp.exp2(top - level)
            total = total * shrink + weights.sum(1)
            acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
            left = length - (first + x) * tile
            if coded:
                scale = lines[1].take(x)[...]
                lines[1].give_back(x, steps)
                key = plgpu.broadcasted_iota(jnp.int32, weights.shape, 1)
                weights = weights * lax.broadcast_in_dim(scale, weights.shape, [1])
                # Weights of 0 do not undo what is not finite in memory never written.
                weights = jnp.where(key < left, weights, 0.0)
            stored = values.take(x)
            if not coded:

                @pl.when(left < tile)
                def _() -> None:
                    key = plgpu.broadcasted_iota(jnp.int32, stored.shape, 0)
                    value = stored[...]
                    stored[...] = jnp.where(key < left, value, jnp.zeros_like(value))
                    plgpu.commit_smem()

            acc = product(weights.astype(dtype), numbers(stored), acc, interpret=interpret)
            values.give_back(x, steps)
            return acc, now, total

        @pl.when(wg < _READERS)
        def _() -> None:
            plgpu.set_max_registers(232, action="increase")
            out_tile, log_tile = out_tiles.at[wg], log_tiles.at[wg]
            plgpu.barrier_wait(ready)
            carry = (
                jnp.zeros((CUDA_ROWS, D), jnp.float32),
                jnp.full((CUDA_ROWS,), -jnp.inf, jnp.float32),
                jnp.zeros((CUDA_ROWS,), jnp.float32),
            )
            turns = div(jnp.maximum(steps - wg, 0) + _READERS - 1, _READERS)
            acc, top, total = lax.fori_loop(0, turns, step, carry)
            sums = jnp.where(total == 0.0, 1.0, total)
            out_tile[...] = acc / lax.broadcast_in_dim(sums, acc.shape, [0])
            log_tile[...] = top + jnp.log2(sums)
            plgpu.commit_smem()
            here, own = pl.ds(0, kept), part * _READERS + wg
            plgpu.copy_smem_to_gmem(out_tile.at[here], out_ref.at[b, n, own])
            plgpu.copy_smem_to_gmem(log_tile.at[here], log_ref.at[b, n, own])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == _READERS)
        def _() -> None:
            plgpu.set_max_registers(40, action="decrease")

            def places(x: Any) -> list[tuple[Any, Any]]:
                """Return the sequence, or the pages, and where in it a step's tile begins."""
                turn = first + x
                if not paged:
                    return [(b, turn * tile)]

                def number(i: Any) -> jax.Array:
                    i = jnp.minimum(i, table_ref.shape[1] - 1)
                    return jnp.clip(table_ref[b, i], 0, pages - 1)

                if page < tile:
                    return [(number(turn * pieces + i), 0) for i in range(pieces)]
                # The compiler has to see that the start is a multiple of the tile.
                start = lax.rem(turn, jnp.int32(page // tile)) * tile
                return [(number(div(turn, page // tile)), start)]

            def source(ref: Any, scale: bool) -> Any:
                def of(x: Any) -> list[Any]:
                    size = tile // pieces
                    return [
                        ref.at[at, n, pl.ds(start, size)]
                        if scale
                        else ref.at[at, pl.ds(start, size), n]
                        for at, start in places(x)
                    ]

                return of

            streams = (keys, values, *lines)
            sources = [source(ref, i >= 2) for i, ref in enumerate(caches)]
            plgpu.copy_gmem_to_smem(q_ref.at[b, n], q_tile, ready)
            pump(list(zip(streams, sources, strict=True)), steps)

    stream = tuple(Stream.scratch((tile, D), kind, slots=slots, readers=1, parts=pieces))
    line = tuple(Stream.scratch((tile,), jnp.float32, slots=slots, readers=1, parts=pieces))
    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((B, K, count * _READERS, kept, D), jnp.float32),
            jax.ShapeDtypeStruct((B, K, count * _READERS, kept), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((CUDA_ROWS, D), dtype),
            plgpu.SMEM((_READERS, CUDA_ROWS, D), jnp.float32),
            plgpu.SMEM((_READERS, CUDA_ROWS), jnp.float32),
            plgpu.SMEM((_READERS, tile if coded else 8, D), dtype),
            (stream, stream, line, line) if coded else (stream, stream),
            plgpu.Barrier(),
        ],
        grid=(count, K, B),
        grid_names=("part", "head", "batch"),
        num_threads=_READERS + 1,
        thread_name="wg",
        compiler_params=cuda_params(warpgroup=True),
        interpret=interpret,
    )(*arrays)
