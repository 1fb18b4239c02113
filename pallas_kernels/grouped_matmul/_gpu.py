"""The kernels for Hopper GPUs: WGMMA over the visits of groups, for one tile of the result each.

Two warpgroups compute 64 rows of a tile each, the third copies what they read. A tile of rows that
several groups share is computed once for each, and keeps the rows that are the group's own.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fnml.pallas_kernels._compiler import cuda_params
from fnml.pallas_kernels._hopper import Stream, Transposed, div, product, pump
from fnml.pallas_kernels.grouped_matmul._blocks import CUDA_ROWS, CUDA_STEP, cuda_columns
from fnml.pallas_kernels.grouped_matmul._visits import plan

_COMPUTE = 2
_HALF = CUDA_ROWS // _COMPUTE


def _padded(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, -x.shape[0] % CUDA_ROWS), (0, 0)))


def forward(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    transpose: bool = False,
    interpret: Any = False,
) -> jax.Array:
    """Return [N, F] for x [N, D] and w [E, D, F], or w [E, F, D] if it is to be transposed."""
    (N, D), F = x.shape, w.shape[1 if transpose else 2]
    x, w = _padded(x), w.astype(x.dtype)
    tiles, columns = x.shape[0] // CUDA_ROWS, cuda_columns(F)
    steps = D // CUDA_STEP
    visits = plan(group_sizes, x.shape[0], CUDA_ROWS)
    tile = jnp.arange(tiles, dtype=jnp.int32)
    # Those that own rows come first among the visits of a tile.
    first = jnp.searchsorted(visits.tile, tile).astype(jnp.int32)
    owned = (visits.tile[None] == tile[:, None]) & (visits.stop > visits.start)[None]
    scalars = (first, owned.sum(1, dtype=jnp.int32), visits.group, visits.start, visits.stop)

    def kernel(*refs: Any) -> None:
        first_ref, count_ref, group_ref, start_ref, stop_ref, x_ref, w_ref, out_ref = refs[:8]
        out_tiles, rows, matrices = refs[8], Stream(*refs[9]), Stream(*refs[10])
        i, j, wg = (lax.axis_index(name) for name in ("tile", "column", "wg"))
        first, count = first_ref[i], count_ref[i]

        @pl.when(wg < _COMPUTE)
        def _() -> None:
            plgpu.set_max_registers(232, action="increase")
            out_tile, start = out_tiles.at[wg], i * CUDA_ROWS + wg * _HALF
            out_tile[...] = jnp.zeros(out_tile.shape, out_tile.dtype)

            @pl.loop(0, count)
            def _(visit: Any) -> None:
                def step(k: Any, acc: jax.Array) -> jax.Array:
                    at = visit * steps + k
                    left = rows.take(at).at[pl.ds(wg * _HALF, _HALF)]
                    right = matrices.take(at)
                    right = Transposed(right) if transpose else right
                    acc = product(left, right, acc, interpret=interpret)
                    rows.give_back(at, count * steps)
                    matrices.give_back(at, count * steps)
                    return acc

                zeros = jnp.zeros((_HALF, columns), jnp.float32)
                acc = lax.fori_loop(0, steps, step, zeros).astype(out_tile.dtype)
                row = start + plgpu.broadcasted_iota(jnp.int32, acc.shape, 0)
                own = (row >= start_ref[first + visit]) & (row < stop_ref[first + visit])
                out_tile[...] = jnp.where(own, acc, out_tile[...])

            plgpu.commit_smem()
            place = out_ref.at[pl.ds(start, _HALF), pl.ds(j * columns, columns)]
            plgpu.copy_smem_to_gmem(out_tile, place)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == _COMPUTE)
        def _() -> None:
            plgpu.set_max_registers(40, action="decrease")

            def inner(at: Any) -> Any:
                return pl.ds(lax.rem(at, jnp.int32(steps)) * CUDA_STEP, CUDA_STEP)

            def of_x(at: Any) -> Any:
                return x_ref.at[pl.ds(i * CUDA_ROWS, CUDA_ROWS), inner(at)]

            def of_w(at: Any) -> Any:
                group, outer = group_ref[first + div(at, steps)], pl.ds(j * columns, columns)
                return (
                    w_ref.at[group, outer, inner(at)]
                    if transpose
                    else w_ref.at[group, inner(at), outer]
                )

            pump([(rows, of_x), (matrices, of_w)], count * steps)

    matrix = (columns, CUDA_STEP) if transpose else (CUDA_STEP, columns)
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((x.shape[0], F), x.dtype),
        scratch_types=[
            plgpu.SMEM((_COMPUTE, _HALF, columns), x.dtype),
            tuple(Stream.scratch((CUDA_ROWS, CUDA_STEP), x.dtype, slots=3)),
            tuple(Stream.scratch(matrix, x.dtype, slots=3)),
        ],
        grid=(F // columns, tiles),
        grid_names=("column", "tile"),
        num_threads=_COMPUTE + 1,
        thread_name="wg",
        compiler_params=cuda_params(warpgroup=True),
        interpret=interpret,
    )(*scalars, x, w)
    return out[:N]


def weight_gradient(
    x: jax.Array, grad: jax.Array, group_sizes: jax.Array, *, like: jax.Array, interpret: Any
) -> jax.Array:
    """Return [E, D, F]: for each group, x's rows [D, n] times the gradient's [n, F]."""
    (E, D, F), columns = like.shape, CUDA_ROWS
    x, grad = _padded(x), _padded(grad)
    stops = jnp.cumsum(group_sizes.astype(jnp.int32), dtype=jnp.int32)
    scalars = (stops - group_sizes.astype(jnp.int32), stops)

    def kernel(start_ref, stop_ref, x_ref, grad_ref, out_ref, out_tiles, rows, grads):
        rows, grads = Stream(*rows), Stream(*grads)
        group, i, j, wg = (lax.axis_index(name) for name in ("group", "row", "column", "wg"))
        start, stop = start_ref[group], stop_ref[group]
        first = div(start, CUDA_STEP)
        steps = jnp.where(stop > start, div(stop + CUDA_STEP - 1, CUDA_STEP) - first, 0)

        @pl.when(wg < _COMPUTE)
        def _() -> None:
            plgpu.set_max_registers(232, action="increase")
            out_tile = out_tiles.at[wg]

            def step(at: Any, acc: jax.Array) -> jax.Array:
                left = rows.take(at).at[:, pl.ds(wg * _HALF, _HALF)]
                begin = (first + at) * CUDA_STEP

                @pl.when((begin < start) | (begin + CUDA_STEP > stop))
                def _() -> None:
                    # The other rows are of other groups, or of none.
                    row = begin + plgpu.broadcasted_iota(jnp.int32, left.shape, 0)
                    own, found = (row >= start) & (row < stop), left[...]
                    left[...] = jnp.where(own, found, jnp.zeros_like(found))
                    plgpu.commit_smem()

                acc = product(Transposed(left), grads.take(at), acc, interpret=interpret)
                rows.give_back(at, steps)
                grads.give_back(at, steps)
                return acc

            acc = lax.fori_loop(0, steps, step, jnp.zeros((_HALF, columns), jnp.float32))
            out_tile[...] = acc.astype(out_tile.dtype)
            plgpu.commit_smem()
            here = pl.ds(i * CUDA_ROWS + wg * _HALF, _HALF)
            plgpu.copy_smem_to_gmem(out_tile, out_ref.at[group, here, pl.ds(j * columns, columns)])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == _COMPUTE)
        def _() -> None:
            plgpu.set_max_registers(40, action="decrease")

            def source(ref: Any, column: Any, size: int) -> Any:
                return lambda at: ref.at[
                    pl.ds((first + at) * CUDA_STEP, CUDA_STEP), pl.ds(column * size, size)
                ]

            pump(
                [(rows, source(x_ref, i, CUDA_ROWS)), (grads, source(grad_ref, j, columns))], steps
            )

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(like.shape, like.dtype),
        scratch_types=[
            plgpu.SMEM((_COMPUTE, _HALF, columns), like.dtype),
            tuple(Stream.scratch((CUDA_STEP, CUDA_ROWS), x.dtype, slots=4)),
            tuple(Stream.scratch((CUDA_STEP, columns), x.dtype, slots=4)),
        ],
        grid=(F // columns, D // CUDA_ROWS, E),
        grid_names=("column", "row", "group"),
        num_threads=_COMPUTE + 1,
        thread_name="wg",
        compiler_params=cuda_params(warpgroup=True),
        interpret=interpret,
    )(*scalars, x, grad)


def backward(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, grad: jax.Array, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of x and w."""
    grad_x = forward(grad, w, group_sizes, transpose=True, interpret=interpret)
    return grad_x, weight_gradient(x, grad, group_sizes, like=w, interpret=interpret)
