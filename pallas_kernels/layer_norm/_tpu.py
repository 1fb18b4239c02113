"""The kernel for TPUs: one pass over the rows, forward and backward."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fnml.pallas_kernels.layer_norm import _tiles
from fnml.pallas_kernels.layer_norm._cost import backward_cost, forward_cost
from fnml.pallas_kernels.rms_norm._blocks import tile_rows, vmem_limit


def _forward_body(*refs: Any, eps: float, residual: bool) -> None:
    if residual:
        x_ref, residual_ref, scale_ref, bias_ref, out_ref, total_ref = refs
        total = x_ref[...] + residual_ref[...]
        total_ref[...] = total
    else:
        x_ref, scale_ref, bias_ref, out_ref = refs
        total = x_ref[...]
    unit, _ = _tiles.normalised(total.astype(jnp.float32), eps)
    scale = jnp.broadcast_to(scale_ref[...].astype(jnp.float32), unit.shape)
    bias = jnp.broadcast_to(bias_ref[...].astype(jnp.float32), unit.shape)
    out_ref[...] = (unit * scale + bias).astype(out_ref.dtype)


def forward(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    eps: float,
    *,
    rows: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Return the normalised sum and the sum of x [N, D] and the residual."""
    N, D = x.shape
    rows = rows or tile_rows(N, D)
    tile = pl.BlockSpec((rows, D), lambda i: (i, 0))
    vector = pl.BlockSpec((1, D), lambda i: (0, 0))
    fused = residual is not None
    arrays = (x, residual) if fused else (x,)
    added = jnp.zeros_like(scale) if bias is None else bias
    cost = forward_cost(N, D, x.dtype.itemsize, fused)
    out = pl.pallas_call(
        functools.partial(_forward_body, eps=eps, residual=fused),
        grid=(pl.cdiv(N, rows),),
        in_specs=[*[tile] * len(arrays), vector, vector],
        out_specs=[tile] * len(arrays),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * len(arrays),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_limit(rows, D)
        ),
        cost_estimate=pl.CostEstimate(**cost._asdict()),
        interpret=interpret,
        name="layer_norm_forward",
    )(*arrays, scale[None, :], added[None, :])
    return (out[0], out[1]) if fused else (out[0], x)


def _backward_body(*refs: Any, eps: float, residual: bool, rows: int) -> None:
    if residual:
        total_ref, grad_ref, more_ref, scale_ref, grad_x_ref, grad_scale_ref, grad_bias_ref = refs
    else:
        total_ref, grad_ref, scale_ref, grad_x_ref, grad_scale_ref, grad_bias_ref = refs
    step = pl.program_id(0)
    # Beyond the last row of the array a tile holds anything, NaN included.
    row = step * total_ref.shape[0] + jax.lax.broadcasted_iota(jnp.int32, total_ref.shape, 0)
    total = jnp.where(row < rows, total_ref[...].astype(jnp.float32), 0.0)
    grad = jnp.where(row < rows, grad_ref[...].astype(jnp.float32), 0.0)
    grad_x, grad_scale = _tiles.slopes(total, scale_ref[...].astype(jnp.float32), grad, eps)
    if residual:
        grad_x = grad_x + more_ref[...].astype(jnp.float32)
    grad_x_ref[...] = grad_x.astype(grad_x_ref.dtype)

    @pl.when(step == 0)
    def _() -> None:
        grad_scale_ref[...] = jnp.zeros_like(grad_scale_ref)
        grad_bias_ref[...] = jnp.zeros_like(grad_bias_ref)

    grad_scale_ref[...] += jnp.sum(grad_scale, axis=0, keepdims=True)
    grad_bias_ref[...] += jnp.sum(grad, axis=0, keepdims=True)


def backward(
    total: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    grad: jax.Array,
    grad_total: jax.Array | None,
    eps: float,
    *,
    rows: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return the gradients of the sum [N, D], the scale [D] and the bias [D]."""
    N, D = total.shape
    rows = rows or tile_rows(N, D)
    tile = pl.BlockSpec((rows, D), lambda i: (i, 0))
    vector = pl.BlockSpec((1, D), lambda i: (0, 0))
    fused = grad_total is not None
    arrays = (total, grad, grad_total) if fused else (total, grad)
    cost = backward_cost(N, D, total.dtype.itemsize, fused)
    grad_x, grad_scale, grad_bias = pl.pallas_call(
        functools.partial(_backward_body, eps=eps, residual=fused, rows=N),
        grid=(pl.cdiv(N, rows),),
        in_specs=[*[tile] * len(arrays), vector],
        out_specs=[tile, vector, vector],
        out_shape=[
            jax.ShapeDtypeStruct(total.shape, total.dtype),
            jax.ShapeDtypeStruct((1, D), jnp.float32),
            jax.ShapeDtypeStruct((1, D), jnp.float32),
        ],
        # One tile after another: all of them add to one gradient of the scale.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem_limit(rows, D)
        ),
        cost_estimate=pl.CostEstimate(**cost._asdict()),
        interpret=interpret,
        name="layer_norm_backward",
    )(*arrays, scale[None, :])
    grad_added = None if bias is None else grad_bias[0].astype(bias.dtype)
    return grad_x, grad_scale[0].astype(scale.dtype), grad_added
