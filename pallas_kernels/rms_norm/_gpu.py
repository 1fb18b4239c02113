"""The kernel for Hopper GPUs: one pass over the rows, forward and backward."""

from typing import Any

import jax

from fnml.pallas_kernels.rms_norm import _gpu_rows
from fnml.pallas_kernels.rms_norm._blocks import CUDA_BACKWARD, CUDA_FORWARD, RowBlocks, cuda_rows


def forward(
    x: jax.Array,
    scale: jax.Array,
    residual: jax.Array | None,
    eps: float,
    *,
    cut: RowBlocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Return the normalised sum and the sum of x [N, D] and the residual."""
    cut = cut or cuda_rows(x.shape, CUDA_FORWARD)
    options: dict[str, Any] = {"centred": False, "cut": cut, "interpret": interpret}
    return _gpu_rows.forward(x, scale, None, residual, eps, **options)


def backward(
    total: jax.Array,
    scale: jax.Array,
    grad: jax.Array,
    grad_total: jax.Array | None,
    eps: float,
    *,
    cut: RowBlocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of the sum [N, D] and of the scale [D]."""
    cut = cut or cuda_rows(total.shape, CUDA_BACKWARD)
    options: dict[str, Any] = {"centred": False, "cut": cut, "interpret": interpret}
    grad_x, grad_scale = _gpu_rows.backward(total, scale, grad, grad_total, eps, **options)
    return grad_x, grad_scale.astype(scale.dtype)
