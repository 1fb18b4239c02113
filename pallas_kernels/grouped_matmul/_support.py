"""What each hand-written body can do."""

import jax
import jax.numpy as jnp

from fnml.pallas_kernels._compiler import hopper_faults
from fnml.pallas_kernels.grouped_matmul._blocks import tpu_tiles


def refusals(x: jax.Array, w: jax.Array) -> dict[str, list[str]]:
    """Say for each body why it cannot run this call; an empty list if it can."""
    tpu, cuda = [], hopper_faults()
    narrow, bfloat, full = jnp.float16, jnp.bfloat16, jnp.float32
    if x.dtype not in (full, bfloat) or w.dtype not in (full, bfloat):
        tpu.append(f"x is {x.dtype} and w {w.dtype}, expected float32 or bfloat16")
    if x.dtype not in (narrow, bfloat) or w.dtype not in (narrow, bfloat, full):
        cuda.append(
            f"x is {x.dtype} and w {w.dtype}, expected float16 or bfloat16, w may be float32"
        )
    if x.size == 0 or tpu_tiles(x.shape[0], *w.shape) is None:
        found = f"x {x.shape} and w {w.shape}: expected D and F in multiples of 128"
        tpu.append(found)
        cuda.append(found)
    return {"tpu": tpu, "cuda": cuda}
