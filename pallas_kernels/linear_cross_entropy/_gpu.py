"""The loss on Hopper GPUs: logits live tile by tile in registers.

One kernel keeps statistics of the logits, another one makes them anew and writes the loss's slopes
by them, for a chunk of tokens at a time; XLA multiplies the slopes. (A tile of a gradient by all of
D does not fit into the registers of a multiprocessor, as it fits into a TPU's memory.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fnml.pallas_kernels._compiler import cuda_params
from fnml.pallas_kernels._hopper import Stream, div, fetch, product, pump
from fnml.pallas_kernels.linear_cross_entropy._blocks import (
    CUDA_CLASSES,
    CUDA_STEP,
    CUDA_TOKENS,
    cuda_chunk,
    cuda_parts,
)
from fnml.pallas_kernels.linear_cross_entropy._tiles import Plan, loss, slope

_COMPUTE = 2
_HALF = CUDA_TOKENS // _COMPUTE


class _Tile(NamedTuple):
    """One warpgroup's tile of logits.

    Attributes:
      logits: float32 [64, classes].
      column: the class of each, int32.
      start: of the token, and of the class, of the first one.
      rows: what :func:`_call` was given for each token, [64].
    """

    logits: jax.Array
    column: jax.Array
    start: tuple[Any, Any]
    rows: list[jax.Array]

    def across(self, row: jax.Array) -> jax.Array:
        """Lay out a number for each token along the classes."""
        return lax.broadcast_in_dim(row, self.logits.shape, [0])


def _call(
    x: jax.Array,
    w: jax.Array,
    rows: list[jax.Array],
    out_type: list[jax.ShapeDtypeStruct],
    scratch: list[Any],
    body: Callable[..., None],
    interpret: Any,
) -> list[jax.Array]:
    """Call a kernel over parts of the classes and tiles of tokens.

    Each warpgroup calls ``body(each, (token, part), outs, scratch)`` with its first token, its part
    of the classes, and a scratch memory of its own; ``each(function, carry)`` folds
    ``function(tile, carry)`` over its tiles of logits.
    """
    (N, D), V = x.shape, w.shape[1]
    tiles, columns, steps = N // CUDA_TOKENS, V // CUDA_CLASSES, D // CUDA_STEP
    parts = cuda_parts(tiles, columns)
    share = -(-columns // parts)

    def kernel(*refs: Any) -> None:
        (x_ref, w_ref, *row_refs), rest = refs[: 2 + len(rows)], refs[2 + len(rows) :]
        outs, (own, row_tiles, tokens, classes, ready) = (
            rest[: len(out_type)],
            rest[len(out_type) :],
        )
        i, part, wg = (lax.axis_index(name) for name in ("tile", "part", "wg"))
        first = part * share
        count = jnp.clip(columns - first, 0, share)
        tokens, classes = Stream(*tokens), Stream(*classes)

        @pl.when(wg < _COMPUTE)
        def _() -> None:
            plgpu.set_max_registers(232, action="increase")
            start = i * CUDA_TOKENS + wg * _HALF
            mine = [tile.at[wg] for tile in row_tiles]
            sources = [ref.at[pl.ds(start, _HALF)] for ref in row_refs]
            fetch(list(zip(sources, mine, strict=True)), ready.at[wg])
            values = [tile[...] for tile in mine]

            def each(function: Callable[..., Any], carry: Any) -> Any:
                def one(tile: Any, carry: Any) -> Any:
                    def step(k: Any, logits: jax.Array) -> jax.Array:
                        at = tile * steps + k
                        left = tokens.take(at).at[pl.ds(wg * _HALF, _HALF)]
                        logits = product(left, classes.take(at), logits, interpret=interpret)
                        tokens.give_back(at, count * steps)
                        classes.give_back(at, count * steps)
                        return logits

                    zeros = jnp.zeros((_HALF, CUDA_CLASSES), jnp.float32)
                    logits = lax.fori_loop(0, steps, step, zeros)
                    column = (first + tile) * CUDA_CLASSES
                    columns = column + plgpu.broadcasted_iota(jnp.int32, logits.shape, 1)
                    return function(_Tile(logits, columns, (start, column), values), carry)

                return lax.fori_loop(0, count, one, carry)

            body(each, (start, part), outs, [tile.at[wg] for tile in own])

        @pl.when(wg == _COMPUTE)
        def _() -> None:
            plgpu.set_max_registers(40, action="decrease")

            def inner(at: Any) -> Any:
                return pl.ds(lax.rem(at, jnp.int32(steps)) * CUDA_STEP, CUDA_STEP)

            def of_x(at: Any) -> Any:
                return x_ref.at[pl.ds(i * CUDA_TOKENS, CUDA_TOKENS), inner(at)]

            def of_w(at: Any) -> Any:
                column = (first + div(at, steps)) * CUDA_CLASSES
                return w_ref.at[inner(at), pl.ds(column, CUDA_CLASSES)]

            pump([(tokens, of_x), (classes, of_w)], count * steps)

    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=[
            [plgpu.SMEM((_COMPUTE, *memory.shape), memory.dtype) for memory in scratch],
            [plgpu.SMEM((_COMPUTE, _HALF), row.dtype) for row in rows],
            tuple(Stream.scratch((CUDA_TOKENS, CUDA_STEP), x.dtype, slots=3)),
            tuple(Stream.scratch((CUDA_STEP, CUDA_CLASSES), x.dtype, slots=3)),
            plgpu.Barrier(num_barriers=_COMPUTE),
        ],
        grid=(parts, tiles),
        grid_names=("part", "tile"),
        num_threads=_COMPUTE + 1,
        thread_name="wg",
        compiler_params=cuda_params(warpgroup=True),
        interpret=interpret,
    )(x, w, *rows)


def _statistics(
    plan: Plan, x: jax.Array, w: jax.Array, labels: jax.Array, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """Return each token's loss and log(Z), both [N], by an online sum over the classes."""
    padded = w.shape[1] != plan.classes

    def body(each: Callable[..., Any], place: tuple[Any, Any], outs: Any, own: Any) -> None:
        def fold(tile: _Tile, carry: tuple) -> tuple:
            (top, total, *sums), logits = carry, tile.logits
            hit = tile.column == tile.across(tile.rows[0])
            # Classes of padding have logits of 0.
            more = [jnp.where(hit, logits, 0.0), logits][: len(sums)]
            sums = [x + y.sum(1) for x, y in zip(sums, more, strict=True)]
            if padded:
                logits = jnp.where(tile.column < plan.classes, logits, -jnp.inf)
            now = jnp.maximum(top, logits.max(1))
            # A part may have classes of padding alone.
            level = jnp.where(now == -jnp.inf, 0.0, now)
            total = total * jnp.exp(top - level) + jnp.exp(logits - tile.across(level)).sum(1)
            return now, total, *sums

        zeros = jnp.zeros((_HALF,), jnp.float32)
        lowest = jnp.full((_HALF,), -jnp.inf, jnp.float32)
        top, total, *sums = each(fold, (lowest, zeros, *[zeros] * (2 if plan.smoothing else 1)))
        empty = total == 0.0
        log = jnp.where(empty, -jnp.inf, top + jnp.log(jnp.where(empty, 1.0, total)))
        start, part = place
        for tile, found in zip(own, (log, *sums), strict=True):
            tile[...] = found
        plgpu.commit_smem()
        for tile, out in zip(own, outs, strict=True):
            plgpu.copy_smem_to_gmem(tile, out.at[part, pl.ds(start, _HALF)])
        plgpu.wait_smem_to_gmem(0)

    N, V = x.shape[0], w.shape[1]
    parts = cuda_parts(N // CUDA_TOKENS, V // CUDA_CLASSES)
    count = 3 if plan.smoothing else 2
    out = [jax.ShapeDtypeStruct((parts, N), jnp.float32)] * count
    line = [jax.ShapeDtypeStruct((_HALF,), jnp.float32)] * count
    logs, *sums = _call(x, w, [labels], out, line, body, interpret)
    log, chosen, mean = jax.nn.logsumexp(logs, 0), sums[0].sum(0), sums[-1].sum(0) / plan.classes
    return loss(plan, log, chosen, mean), log


def _slopes(
    plan: Plan,
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    log: jax.Array,
    interpret: Any,
) -> jax.Array:
    """Return the slopes of the weighted losses by the logits, [N, V]."""
    padded = w.shape[1] != plan.classes

    def body(each: Callable[..., Any], place: tuple[Any, Any], outs: Any, own: Any) -> None:
        def write(tile: _Tile, carry: Any) -> Any:
            label, weight, log = (tile.across(row) for row in tile.rows)
            probability = jnp.exp(tile.logits - log)
            out = slope(plan, probability, log, tile.column == label, weight)
            if padded:
                out = jnp.where(tile.column < plan.classes, out, 0.0)
            token, column = tile.start
            plgpu.wait_smem_to_gmem(0)
            own[0][...] = out.astype(x.dtype)
            plgpu.commit_smem()
            here = (pl.ds(token, _HALF), pl.ds(column, CUDA_CLASSES))
            plgpu.copy_smem_to_gmem(own[0], outs[0].at[here])
            return carry

        each(write, ())
        plgpu.wait_smem_to_gmem(0)

    out = [jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)]
    tile = [jax.ShapeDtypeStruct((_HALF, CUDA_CLASSES), x.dtype)]
    return _call(x, w, [labels, weights, log], out, tile, body, interpret)[0]


def _whole(rows: int, x: jax.Array, w: jax.Array, *each: jax.Array) -> list[jax.Array]:
    """Fill up to whole tiles: tokens of weight 0, classes whose logits are left out."""
    more = -x.shape[0] % rows
    w = jnp.pad(w, ((0, 0), (0, -w.shape[1] % CUDA_CLASSES)))
    return [jnp.pad(x, ((0, more), (0, 0))), w, *(jnp.pad(a, (0, more)) for a in each)]


def losses(
    plan: Plan, x: jax.Array, w: jax.Array, labels: jax.Array, weights: jax.Array, *, interpret: Any
) -> jax.Array:
    """Return the losses [N]."""
    whole, w, labels = _whole(CUDA_TOKENS, x, w, labels)
    return _statistics(plan, whole, w, labels, interpret)[0][: x.shape[0]]


def losses_and_grads(
    plan: Plan, x: jax.Array, w: jax.Array, labels: jax.Array, weights: jax.Array, *, interpret: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the losses [N], and the gradients of their weighted sum by x and w."""
    (N, D), V = x.shape, w.shape[1]
    chunk = cuda_chunk(N, V)
    whole, w, labels, weights = _whole(chunk, x, w, labels, weights)
    out, log = _statistics(plan, whole, w, labels, interpret)

    def one(grad_w: jax.Array, inputs: tuple) -> tuple[jax.Array, jax.Array]:
        x, labels, weights, log = inputs
        slopes = _slopes(plan, x, w, labels, weights, log, interpret)
        over_v, over_n = (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))
        grad_x = lax.dot_general(slopes, w, over_v, preferred_element_type=jnp.float32)
        more = lax.dot_general(x, slopes, over_n, preferred_element_type=jnp.float32)
        return grad_w + more, grad_x.astype(x.dtype)

    chunks = [a.reshape(-1, chunk, *a.shape[1:]) for a in (whole, labels, weights, log)]
    grad_w, grad_x = lax.scan(one, jnp.zeros(w.shape, jnp.float32), tuple(chunks))
    return out[:N], grad_x.reshape(-1, D)[:N], grad_w[:, :V].astype(w.dtype)
