"""Norms of rows on Hopper GPUs through Mosaic: what rms_norm and layer_norm share.

One warpgroup normalises one row at a time, straight from global memory to registers; several of
them on every core hide each other's waits. A row of one part is read once. The parts of a wider one
are read again for its results, from the nearest cache.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fnml.pallas_kernels._compiler import cuda_params
from fnml.pallas_kernels.rms_norm._blocks import RowBlocks

Part = Callable[[Any], jax.Array]
"""From the index of a part of a row to its numbers."""


class _Rows(NamedTuple):
    """The loops of one block of threads over ``rows`` rows of ``parts`` parts."""

    cut: RowBlocks
    rows: int
    parts: int

    def at(self, part: Any) -> Any:
        """Return the columns of a part."""
        return pl.ds(part * self.cut.part, self.cut.part)

    def once(self, load: Part) -> Part:
        """Return ``load``, or what it gives the only time where a row is one part."""
        if self.parts > 1:
            return load
        found = load(0)
        return lambda part: found

    def mean(self, numbers: Part) -> jax.Array:
        """Return the mean along the row: parts are added first, so the threads meet once."""
        if self.parts == 1:
            together = numbers(0)
        else:
            zeros = jnp.zeros(self.cut.part, jnp.float32)
            add = lambda part, total: total + numbers(part)
            together = lax.fori_loop(0, self.parts, add, zeros)
        return jnp.sum(together) * (1 / (self.parts * self.cut.part))

    def each_part(self, body: Callable[[Any], None]) -> None:
        if self.parts == 1:
            body(0)
        else:
            pl.loop(0, self.parts)(body)

    def each_row(self, body: Callable[[Any], None]) -> None:
        block = lax.axis_index("block")
        more = jnp.int32(self.rows - 1 + self.cut.blocks) - block
        steps = lax.div(more, jnp.int32(self.cut.blocks))
        pl.loop(0, steps)(lambda step: body(block + step * self.cut.blocks))

    def unit(self, value: Part, eps: float, centred: bool) -> tuple[Part, jax.Array]:
        """Return a row less its mean (if ``centred``) over its deviation, and 1 / deviation."""
        centre = self.mean(value) if centred else 0.0

        def square(part: Any) -> jax.Array:
            far = value(part) - centre
            return far * far

        inverse = lax.rsqrt(self.mean(square) + eps)
        return lambda part: (value(part) - centre) * inverse, inverse


def _numbers(ref: Any, *at: Any) -> jax.Array:
    return ref[at].astype(jnp.float32)


def forward(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    eps: float,
    *,
    centred: bool,
    cut: RowBlocks,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Return the normalised sum and the sum of x [N, D] and the residual."""
    rows = _Rows(cut, x.shape[0], x.shape[1] // cut.part)

    def kernel(*refs: Any) -> None:
        ins, outs = list(refs[: len(arrays)]), refs[len(arrays) :]
        x_ref, scale_ref = ins[:2]
        bias_ref = None if bias is None else ins[2]
        residual_ref = None if residual is None else ins[-1]
        scales = rows.once(lambda part: _numbers(scale_ref, rows.at(part)))

        def normalise(row: Any) -> None:
            def load(part: Any) -> jax.Array:
                found = x_ref[row, rows.at(part)]
                return found if residual_ref is None else found + residual_ref[row, rows.at(part)]

            total = rows.once(load)
            unit, _ = rows.unit(lambda part: total(part).astype(jnp.float32), eps, centred)

            @rows.each_part
            def write(part: Any) -> None:
                at = rows.at(part)
                if residual_ref is not None:
                    outs[1][row, at] = total(part)
                out = unit(part) * scales(part)
                if bias_ref is not None:
                    out = out + _numbers(bias_ref, at)
                outs[0][row, at] = out.astype(x.dtype)

        rows.each_row(normalise)

    arrays = [array for array in (x, scale, bias, residual) if array is not None]
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    fused = residual is not None
    out = _call(kernel, [like] * (1 + fused), (), cut, interpret)(*arrays)
    return (out[0], out[1]) if fused else (out[0], x)


def backward(
    total: jax.Array,
    scale: jax.Array,
    grad: jax.Array,
    grad_total: jax.Array | None,
    eps: float,
    *,
    centred: bool,
    cut: RowBlocks,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """Return the gradients of the sum [N, D] and, in float32, of the scale and the bias [D].

    Only a centred norm has a bias. Every block of threads adds up the vectors' gradients over its
    own rows in shared memory, and XLA adds up the blocks: always in the same order.
    """
    N, D = total.shape
    rows = _Rows(cut, N, D // cut.part)

    def kernel(*refs: Any) -> None:
        total_ref, scale_ref, grad_ref = refs[:3]
        more_ref = None if grad_total is None else refs[3]
        back_ref, *sum_refs = refs[len(arrays) : -len(vectors)]
        tiles = refs[-len(vectors) :]

        @rows.each_part
        def clear(part: Any) -> None:
            for tile in tiles:
                tile[rows.at(part)] = jnp.zeros(cut.part, jnp.float32)

        plgpu.commit_smem()

        def slopes(row: Any) -> None:
            value = rows.once(lambda part: _numbers(total_ref, row, rows.at(part)))
            slope = rows.once(lambda part: _numbers(grad_ref, row, rows.at(part)))
            unit, inverse = rows.unit(value, eps, centred)

            def inner(part: Any) -> jax.Array:
                return slope(part) * _numbers(scale_ref, rows.at(part))

            along = rows.mean(lambda part: inner(part) * unit(part))
            level = rows.mean(inner) if centred else 0.0

            @rows.each_part
            def write(part: Any) -> None:
                at = rows.at(part)
                far, steep = unit(part), slope(part)
                back = (inner(part) - level - far * along) * inverse
                if more_ref is not None:
                    back = back + _numbers(more_ref, row, at)
                back_ref[row, at] = back.astype(total.dtype)
                for tile, gain in zip(tiles, (steep * far, steep), strict=False):
                    tile[at] += gain

        rows.each_row(slopes)
        plgpu.commit_smem()

        @rows.each_part
        def report(part: Any) -> None:
            for ref, tile in zip(sum_refs, tiles, strict=True):
                ref[lax.axis_index("block"), rows.at(part)] = tile[rows.at(part)]

    arrays = [array for array in (total, scale, grad, grad_total) if array is not None]
    vectors = [jax.ShapeDtypeStruct((cut.blocks, D), jnp.float32)] * (1 + centred)
    like = jax.ShapeDtypeStruct(total.shape, total.dtype)
    scratch = [plgpu.SMEM((D,), jnp.float32) for _ in vectors]
    back, *sums = _call(kernel, [like, *vectors], scratch, cut, interpret)(*arrays)
    return back, *(vector.sum(0) for vector in sums)


def _call(kernel: Any, types: Any, scratch: Any, cut: RowBlocks, interpret: Any) -> Any:
    return plgpu.kernel(
        kernel,
        out_type=types,
        scratch_types=scratch,
        grid=(cut.blocks,),
        grid_names=("block",),
        compiler_params=cuda_params(fast=False, warpgroup=True),
        interpret=interpret,
    )
