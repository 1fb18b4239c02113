"""The kernel for Hopper GPUs: one pass over the rows, forward and backward."""

from typing import Any

import jax

from fnml.pallas_kernels.rms_norm import _gpu_rows
from fnml.pallas_kernels.rms_norm._blocks import CUDA_BACKWARD, CUDA_FORWARD, RowBlocks, cuda_rows


def forward(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    eps: float,
    *,
    cut: RowBlocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Return the normalised sum and the sum of x [N, D] and the residual."""
    cut = cut or cuda_rows(x.shape, CUDA_FORWARD)
    options: dict[str, Any] = {"centred": True, "cut": cut, "interpret": interpret}
    return _gpu_rows.forward(x, scale, bias, residual, eps, **options)


def backward(
    total: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    grad: jax.Array,
    grad_total: jax.Array | None,
    eps: float,
    *,
    cut: RowBlocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return the gradients of the sum [N, D], the scale [D] and the bias [D]."""
    cut = cut or cuda_rows(total.shape, CUDA_BACKWARD)
    options: dict[str, Any] = {"centred": True, "cut": cut, "interpret": interpret}
    grad_x, *vectors = _gpu_rows.backward(total, scale, grad, grad_total, eps, **options)
    grad_bias = None if bias is None else vectors[1].astype(bias.dtype)
    return grad_x, vectors[0].astype(scale.dtype), grad_bias
