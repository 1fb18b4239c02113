"""The kernel for TPUs: prefetched scalars say which group's matrix meets which tile of rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fnml.pallas_kernels.grouped_matmul._blocks import tpu_tiles
from fnml.pallas_kernels.grouped_matmul._cost import cost
from fnml.pallas_kernels.grouped_matmul._visits import Visits, plan


def _own(visits: Visits, turn: Any, shape: tuple[int, ...]) -> jax.Array:
    """Tell which rows of its tile a visit owns, for a tile of ``shape``."""
    row = visits.tile[turn] * shape[0] + lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= visits.start[turn]) & (row < visits.stop[turn])


def _changes(numbers: Any, turn: Any) -> Any:
    """Tell whether a turn is the first one with its number."""
    return (turn == 0) | (numbers[turn] != numbers[jnp.maximum(turn - 1, 0)])


def _params(*semantics: Any) -> Any:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=32 * 2**20)


def _forward_body(*refs: Any, transpose: bool) -> None:
    visits, (x_ref, w_ref, out_ref, sum_ref) = Visits(*refs[:4]), refs[4:]
    turn, step = pl.program_id(1), pl.program_id(2)

    @pl.when((step == 0) & _changes(visits.tile, turn))
    def _() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(visits.stop[turn] > visits.start[turn])
    def _() -> None:
        @pl.when(step == 0)
        def _() -> None:
            sum_ref[...] = jnp.zeros_like(sum_ref)

        over = (((1,), (1 if transpose else 0,)), ((), ()))
        x, matrix = x_ref[...], w_ref[0].astype(x_ref.dtype)
        sum_ref[...] += lax.dot_general(x, matrix, over, preferred_element_type=jnp.float32)

        @pl.when(step == pl.num_programs(2) - 1)
        def _() -> None:
            own = _own(visits, turn, out_ref.shape)
            old = out_ref[...].astype(jnp.float32)
            out_ref[...] = jnp.where(own, sum_ref[...], old).astype(out_ref.dtype)


def forward(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    transpose: bool = False,
    interpret: Any = False,
) -> jax.Array:
    """Return [N, F] for x [N, D] and w [E, D, F], or w [E, F, D] if it is to be transposed."""
    (N, D), (E, *_), F = x.shape, w.shape, w.shape[1 if transpose else 2]
    tiles = tpu_tiles(N, E, D, F)
    assert tiles is not None
    visits = plan(group_sizes, N, tiles.m)

    def of_x(n: Any, turn: Any, k: Any, group: Any, tile: Any, *_: Any) -> tuple[Any, Any]:
        return tile[turn], k

    def of_w(n: Any, turn: Any, k: Any, group: Any, *_: Any) -> tuple[Any, Any, Any]:
        return (group[turn], n, k) if transpose else (group[turn], k, n)

    def of_out(n: Any, turn: Any, k: Any, group: Any, tile: Any, *_: Any) -> tuple[Any, Any]:
        return tile[turn], n

    matrix = (1, tiles.n, tiles.k) if transpose else (1, tiles.k, tiles.n)
    estimate = cost(N, E, D, F, x.dtype.itemsize, w.dtype.itemsize)
    return pl.pallas_call(
        functools.partial(_forward_body, transpose=transpose),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(F // tiles.n, visits.tile.shape[0], D // tiles.k),
            in_specs=[
                pl.BlockSpec((tiles.m, tiles.k), of_x),
                pl.BlockSpec(matrix, of_w),
            ],
            out_specs=pl.BlockSpec((tiles.m, tiles.n), of_out),
            scratch_shapes=[pltpu.VMEM((tiles.m, tiles.n), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((N, F), x.dtype),
        compiler_params=_params("parallel", "arbitrary", "arbitrary"),
        cost_estimate=pl.CostEstimate(**estimate._asdict()),
        interpret=interpret,
        name="grouped_matmul_forward",
    )(*visits, x, w)


def _weight_body(*refs: Any) -> None:
    visits, (x_ref, grad_ref, out_ref, sum_ref) = Visits(*refs[:4]), refs[4:]
    turn, turns = pl.program_id(2), pl.num_programs(2)

    @pl.when(_changes(visits.group, turn))
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(visits.stop[turn] > visits.start[turn])
    def _() -> None:
        # Both sides: beyond the last row lies anything, and 0 times NaN is NaN.
        x = jnp.where(_own(visits, turn, x_ref.shape), x_ref[...].astype(jnp.float32), 0.0)
        grad = jnp.where(_own(visits, turn, grad_ref.shape), grad_ref[...].astype(jnp.float32), 0.0)
        sum_ref[...] += lax.dot_general(
            x.astype(x_ref.dtype),
            grad.astype(grad_ref.dtype),
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

    last = (turn == turns - 1) | (
        visits.group[turn] != visits.group[jnp.minimum(turn + 1, turns - 1)]
    )

    @pl.when(last)
    def _() -> None:
        out_ref[0] = sum_ref[...].astype(out_ref.dtype)


def weight_gradient(
    x: jax.Array, grad: jax.Array, group_sizes: jax.Array, *, like: jax.Array, interpret: Any
) -> jax.Array:
    """Return [E, D, F]: for each group, x's rows [D, n] times the gradient's [n, F]."""
    (N, D), (E, _, F) = x.shape, like.shape
    tiles = tpu_tiles(N, E, D, F)
    assert tiles is not None
    visits = plan(group_sizes, N, tiles.m)
    estimate = cost(N, E, D, F, x.dtype.itemsize, like.dtype.itemsize)
    out = pl.pallas_call(
        _weight_body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(D // tiles.k, F // tiles.n, visits.tile.shape[0]),
            in_specs=[
                pl.BlockSpec(
                    (tiles.m, tiles.k), lambda k, n, turn, group, tile, *_: (tile[turn], k)
                ),
                pl.BlockSpec(
                    (tiles.m, tiles.n), lambda k, n, turn, group, tile, *_: (tile[turn], n)
                ),
            ],
            out_specs=pl.BlockSpec(
                (1, tiles.k, tiles.n), lambda k, n, turn, group, *_: (group[turn], k, n)
            ),
            scratch_shapes=[pltpu.VMEM((tiles.k, tiles.n), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(like.shape, like.dtype),
        compiler_params=_params("parallel", "parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(**estimate._asdict()),
        interpret=interpret,
        name="grouped_matmul_weight_gradient",
    )(*visits, x, grad)
    # Nobody comes to the matrix of a group without rows.
    return jnp.where((group_sizes > 0)[:, None, None], out, jnp.zeros_like(out))


def backward(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, grad: jax.Array, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of x and w."""
    grad_x = forward(grad, w, group_sizes, transpose=True, interpret=interpret)
    return grad_x, weight_gradient(x, grad, group_sizes, like=w, interpret=interpret)
