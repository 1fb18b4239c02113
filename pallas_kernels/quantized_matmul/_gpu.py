"""The kernel for a few rows on Hopper GPUs: codes travel as codes, and become numbers in registers.

A product of one to eight rows is a matter of reading the codes. Each block of threads has a few
columns for itself; its warpgroups take turns with batches of rows, load the next one before they
multiply with this one, and meet once at the end.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fnml.pallas_kernels._compiler import cuda_params
from fnml.pallas_kernels.quantized_matmul._blocks import CUDA_WARPGROUPS, CudaTiles, cuda_tiles
from fnml.pallas_kernels.quantized_matmul._packed import Layout, Packed, unpack

_MAGIC = 0x4B400000
"""The bits of 1.5 * 2**23 as a float32, to which small integers add as they are."""


def forward(
    x: jax.Array, packed: Packed, *, layout: Layout, out_dtype: Any, interpret: Any = False
) -> jax.Array:
    """Return ``x @ dequantised`` for a few rows x [M, in]; the numbers are not rounded."""
    M, N = x.shape[0], packed.codes.shape[1]
    tiles = cuda_tiles(layout, M, N)
    assert tiles is not None
    shape, place = (tiles.rows, tiles.n), _place(tiles)
    batches = layout.part // tiles.batch

    def load(ref: Any, at: Any, held: Any = place) -> jax.Array:
        """Read a piece; where its threads hold it is the compiler's matter alone."""
        return ref[at] if interpret else plgpu.load(ref, at, layout=held, optimized=False)

    def placed(tile: jax.Array) -> jax.Array:
        return tile if interpret else plgpu.layout_cast(tile, place)

    def spread(line: jax.Array, axis: int) -> jax.Array:
        return placed(lax.broadcast_in_dim(line.astype(jnp.float32), shape, [axis]))

    def kernel(x_ref: Any, codes_ref: Any, scale_ref: Any, *refs: Any) -> None:
        *zero_ref, out_ref, sums_ref, meet = refs
        block, wg = lax.axis_index("block"), lax.axis_index("wg")
        columns = pl.ds(block * tiles.n, tiles.n)

        def grid(ref: Any, row: Any) -> jax.Array:
            """Return the scales, or zeros, of the group of a row."""
            group = lax.div(row, jnp.int32(layout.group))
            return spread(load(ref, (group, columns), place.reduce(0)), 1)

        def rows_of(index: Any) -> list[Any]:
            """Return the first rows of the tiles of a batch; the last batch follows itself."""
            batch = jnp.minimum(wg + index * CUDA_WARPGROUPS, batches - 1)
            return [batch * tiles.batch + count * tiles.rows for count in range(tiles.at_once)]

        def fetch(index: Any) -> list[jax.Array]:
            return [load(codes_ref, (pl.ds(row, tiles.rows), columns)) for row in rows_of(index)]

        def step(index: Any, carry: tuple[list, list]) -> tuple[list, list]:
            sums, codes = carry
            following, rows = fetch(index + 1), rows_of(index)
            for part in range(layout.parts):
                offset = part * layout.part
                for run in _runs(tiles, layout):
                    inside: list[Any] = [None] * M
                    zero = grid(zero_ref[0], offset + rows[run[0]]) if zero_ref else None
                    for count in run:
                        whole = unpack(codes[count], part, layout.bits, zero is None)
                        numbers = _floats(whole)
                        numbers = numbers if zero is None else numbers - zero
                        for m in range(M):
                            at = (m, pl.ds(offset + rows[count], tiles.rows))
                            more = numbers * spread(load(x_ref, at, place.reduce(1)), 0)
                            inside[m] = more if inside[m] is None else inside[m] + more
                    scale = grid(scale_ref, offset + rows[run[0]])
                    sums = [total + more * scale for total, more in zip(sums, inside, strict=True)]
            return sums, following

        zeros = placed(jnp.zeros(shape, jnp.float32))
        mine = lax.div(jnp.int32(batches + CUDA_WARPGROUPS - 1) - wg, jnp.int32(CUDA_WARPGROUPS))
        sums = lax.fori_loop(0, mine, step, ([zeros] * M, fetch(jnp.int32(0))))[0]
        for m, total in enumerate(sums):
            sums_ref[wg, m] = total
        plgpu.barrier_arrive(meet)

        @pl.when(wg == 0)
        def _() -> None:
            plgpu.barrier_wait(meet)
            for m in range(M):
                total = load(sums_ref, (0, m))
                for other in range(1, CUDA_WARPGROUPS):
                    total = total + load(sums_ref, (other, m))
                out_ref[m, columns] = total.sum(0).astype(out_dtype)

    arrays = [array for array in (x, *packed) if array is not None]
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, N), out_dtype),
        scratch_types=[
            plgpu.SMEM((CUDA_WARPGROUPS, M, *shape), jnp.float32),
            plgpu.Barrier(num_arrivals=CUDA_WARPGROUPS),
        ],
        grid=(N // tiles.n,),
        grid_names=("block",),
        num_threads=CUDA_WARPGROUPS,
        thread_name="wg",
        compiler_params=cuda_params(fast=False),
        interpret=interpret,
    )(*arrays)


def _place(tiles: CudaTiles) -> Any:
    """Give each thread four neighbours in a row of a tile, so that a row is read in one piece."""
    dims: dict[str, Any]
    if tiles.rows == 4:
        tiling, dims = plgpu.Tiling(((4, tiles.n), (4,))), {"warp_dims": (-3,), "lane_dims": (-2,)}
    else:
        tiling = plgpu.Tiling(((tiles.rows, tiles.n), (tiles.rows // 4, tiles.n), (4,)))
        dims = {"warp_dims": (-5,), "lane_dims": (-3, -2)}
    return plgpu.Layout.TILED(tiling, **dims, vector_dim=-1)


def _floats(whole: jax.Array) -> jax.Array:
    """Convert small int32 numbers exactly, by two additions instead of a conversion."""
    return lax.bitcast_convert_type(whole + _MAGIC, jnp.float32) - 1.5 * 2**23


def _runs(tiles: CudaTiles, layout: Layout) -> list[range]:
    """Cut the tiles of a batch where a group ends."""
    each = min(layout.group // tiles.rows, tiles.at_once)
    return [range(first, first + each) for first in range(0, tiles.at_once, each)]
