"""The kernel for TPUs: codes travel as codes, and become numbers beside the matrix unit."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fnml.pallas_kernels.quantized_matmul._blocks import Tiles, tpu_tiles
from fnml.pallas_kernels.quantized_matmul._cost import cost
from fnml.pallas_kernels.quantized_matmul._packed import Layout, Packed, unpack


def _weights(codes_ref: Any, grids: tuple[Any, ...], layout: Layout, dtype: Any) -> list[jax.Array]:
    """Return each part's numbers [k, n] of a tile of codes."""
    codes = codes_ref[...]
    rows, columns = codes.shape
    weights = []
    for part in range(layout.parts):
        scale_ref, *zero_ref = grids[part :: layout.parts]
        whole = unpack(codes, part, layout.bits, not zero_ref).astype(jnp.float32)
        groups = scale_ref.shape[1]
        shape = (groups, rows // groups, columns)
        whole = whole.reshape(shape)
        if zero_ref:
            whole = whole - jnp.broadcast_to(zero_ref[0][0][:, None, :], shape)
        whole = whole * jnp.broadcast_to(scale_ref[0][:, None, :], shape)
        weights.append(whole.reshape(rows, columns).astype(dtype))
    return weights


def _forward_body(*refs: Any, layout: Layout, grids: int) -> None:
    xs, (codes_ref, *rest) = refs[: layout.parts], refs[layout.parts :]
    grid_refs, (out_ref, sum_ref) = rest[:grids], rest[grids:]
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    weights = _weights(codes_ref, tuple(grid_refs), layout, xs[0].dtype)
    for x_ref, weight in zip(xs, weights, strict=True):
        sum_ref[...] += jnp.dot(x_ref[...], weight, preferred_element_type=jnp.float32)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _backward_body(grad_ref: Any, codes_ref: Any, *refs: Any, layout: Layout, grids: int) -> None:
    grid_refs, (out_ref, sum_ref) = refs[:grids], refs[grids:]
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    weights = _weights(codes_ref, tuple(grid_refs), layout, grad_ref.dtype)
    for part, weight in enumerate(weights):
        sum_ref[part] += lax.dot_general(
            grad_ref[...], weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _grids(packed: Packed, layout: Layout, tiles: Tiles) -> list[jax.Array]:
    """Cut scales, and zeros, to [blocks, groups in a tile, out], once for each part."""
    inside = max(tiles.k // layout.group, 1)
    each = [packed.scale] if packed.zero is None else [packed.scale, packed.zero]
    cut = [grid.astype(jnp.float32).reshape(-1, inside, grid.shape[1]) for grid in each]
    return [grid for grid in cut for _ in range(layout.parts)]


def _grid_specs(layout: Layout, tiles: Tiles, count: int, k_axis: int, n_axis: int) -> list[Any]:
    inside = max(tiles.k // layout.group, 1)

    def spec(part: int) -> Any:
        def where(*at: Any) -> tuple[Any, int, Any]:
            row = part * layout.part + at[k_axis] * tiles.k
            return lax.div(row, layout.group * inside), 0, at[n_axis]

        return pl.BlockSpec((1, inside, tiles.n), where)

    return [spec(part) for _ in range(count // layout.parts) for part in range(layout.parts)]


def _params() -> Any:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=32 * 2**20
    )


def forward(
    x: jax.Array, packed: Packed, *, layout: Layout, out_dtype: Any, interpret: Any = False
) -> jax.Array:
    """Return ``x @ dequantised`` for x [M, in]."""
    M, N = x.shape[0], packed.codes.shape[1]
    tiles = tpu_tiles(layout, M, N)
    assert tiles is not None
    steps = layout.part // tiles.k
    grids = _grids(packed, layout, tiles)

    def of_x(part: int) -> Any:
        return pl.BlockSpec((tiles.m, tiles.k), lambda i, j, k: (i, part * steps + k))

    estimate = cost(M, layout.rows, N, layout.bits, packed.scale.shape[0], x.dtype.itemsize)
    return pl.pallas_call(
        functools.partial(_forward_body, layout=layout, grids=len(grids)),
        grid=(pl.cdiv(M, tiles.m), N // tiles.n, steps),
        in_specs=[
            *[of_x(part) for part in range(layout.parts)],
            pl.BlockSpec((tiles.k, tiles.n), lambda i, j, k: (k, j)),
            *_grid_specs(layout, tiles, len(grids), 2, 1),
        ],
        out_specs=pl.BlockSpec((tiles.m, tiles.n), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((M, N), out_dtype),
        scratch_shapes=[pltpu.VMEM((tiles.m, tiles.n), jnp.float32)],
        compiler_params=_params(),
        cost_estimate=pl.CostEstimate(**estimate._asdict()),
        interpret=interpret,
        name="quantized_matmul_forward",
    )(*[x] * layout.parts, packed.codes, *grids)


def backward(
    grad: jax.Array, packed: Packed, *, layout: Layout, dtype: Any, interpret: Any = False
) -> jax.Array:
    """Return the gradient of x [M, in] in ``dtype``, given that of the product [M, out]."""
    M, N = grad.shape
    tiles = tpu_tiles(layout, M, N)
    assert tiles is not None
    grids = _grids(packed, layout, tiles)
    estimate = cost(M, layout.rows, N, layout.bits, packed.scale.shape[0], grad.dtype.itemsize)
    out = pl.pallas_call(
        functools.partial(_backward_body, layout=layout, grids=len(grids)),
        grid=(pl.cdiv(M, tiles.m), layout.part // tiles.k, N // tiles.n),
        in_specs=[
            pl.BlockSpec((tiles.m, tiles.n), lambda i, k, j: (i, j)),
            pl.BlockSpec((tiles.k, tiles.n), lambda i, k, j: (k, j)),
            *_grid_specs(layout, tiles, len(grids), 1, 2),
        ],
        out_specs=pl.BlockSpec((layout.parts, tiles.m, tiles.k), lambda i, k, j: (0, i, k)),
        out_shape=jax.ShapeDtypeStruct((layout.parts, M, layout.part), dtype),
        scratch_shapes=[pltpu.VMEM((layout.parts, tiles.m, tiles.k), jnp.float32)],
        compiler_params=_params(),
        cost_estimate=pl.CostEstimate(**estimate._asdict()),
        interpret=interpret,
        name="quantized_matmul_backward",
    )(grad.astype(dtype), packed.codes, *grids)
    return jnp.moveaxis(out, 0, 1).reshape(M, -1)
