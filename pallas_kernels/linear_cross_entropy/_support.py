"""What each hand-written body can do."""

import jax
import jax.numpy as jnp

from fnml.pallas_kernels._compiler import hopper_faults
from fnml.pallas_kernels.linear_cross_entropy._blocks import CUDA_STEP, TPU_WIDEST


def refusals(x: jax.Array) -> dict[str, list[str]]:
    """Say for each body why it cannot run this call; an empty list if it can."""
    tpu, cuda = [], hopper_faults()
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        tpu.append(f"dtype {x.dtype} (it takes float32 and bfloat16)")
    if x.shape[-1] > TPU_WIDEST or x.shape[-1] % 8:
        tpu.append(f"width {x.shape[-1]} (it takes multiples of 8 up to {TPU_WIDEST})")
    if x.dtype not in (jnp.float16, jnp.bfloat16):
        cuda.append(f"dtype {x.dtype} (it takes float16 and bfloat16)")
    if x.shape[-1] % CUDA_STEP or not x.shape[-1]:
        cuda.append(f"width {x.shape[-1]} (it takes multiples of {CUDA_STEP})")
    return {"tpu": tpu, "cuda": cuda}
