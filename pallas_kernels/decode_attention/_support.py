"""What each hand-written body can do."""

import jax.numpy as jnp

from fnml.pallas_kernels._compiler import hopper_faults
from fnml.pallas_kernels.decode_attention._blocks import (
    CUDA_ROWS,
    CUDA_TILE,
    CUDA_WIDTHS,
    MOST_COLUMNS,
    MOST_ROWS,
)
from fnml.pallas_kernels.decode_attention._operands import Operands


def refusals(operands: Operands) -> dict[str, list[str]]:
    """Say for each body why it cannot run this call; an empty list if it can."""
    if operands.q.size == 0 or operands.length == 0:
        found = f"there is nothing to read: q {operands.q.shape}, cache {operands.k.shape}"
        return {"tpu": [found], "cuda": [found]}
    return {"tpu": _tpu(operands), "cuda": _cuda(operands)}


def _tpu(operands: Operands) -> list[str]:
    q, k = operands.q, operands.k
    reasons = []
    floats = (jnp.float32, jnp.bfloat16)
    if q.dtype not in floats or k.dtype not in (*floats, jnp.int8):
        reasons.append(
            f"q is {q.dtype} and the cache {k.dtype}, expected float32 or bfloat16, or int8 in the "
            "cache"
        )
    if q.shape[1] * q.shape[2] > MOST_ROWS:
        reasons.append(
            f"{q.shape[1]} tokens of {q.shape[2]} heads are more than the {MOST_ROWS} queries it "
            "takes at once: attention() is for prompts"
        )
    columns = k.shape[1] * k.shape[2]
    if operands.page_table is not None and columns > MOST_COLUMNS:
        reasons.append(
            f"pages of {k.shape[1]} tokens of {k.shape[2]} heads have more than the {MOST_COLUMNS} "
            "keys it takes at once"
        )
    return reasons


def _cuda(operands: Operands) -> list[str]:
    q, k = operands.q, operands.k
    reasons = hopper_faults()
    if q.dtype not in (jnp.float16, jnp.bfloat16) or k.dtype not in (q.dtype, jnp.int8):
        reasons.append(
            f"q is {q.dtype} and the cache {k.dtype}, expected float16 or bfloat16 in both, or int8 "
            "in the cache"
        )
    if q.shape[3] not in CUDA_WIDTHS:
        reasons.append(f"head width {q.shape[3]} (it takes {', '.join(map(str, CUDA_WIDTHS))})")
    queries = q.shape[1] * (q.shape[2] // k.shape[2])
    if queries > CUDA_ROWS:
        reasons.append(
            f"{queries} queries of one head of keys are more than the {CUDA_ROWS} it takes at "
            "once: attention() is for prompts"
        )
    page = k.shape[1]
    # A copy's target begins at a multiple of 128 bytes: 32 scales, or 8 rows of a tile.
    small = (32,) if k.dtype == jnp.int8 else (8, 16, 32)
    if operands.page_table is None and page % CUDA_TILE:
        reasons.append(f"a cache of {page} tokens (it takes multiples of {CUDA_TILE})")
    elif page % CUDA_TILE and page not in small:
        sizes = ", ".join(map(str, small))
        reasons.append(
            f"pages of {page} tokens (it takes {sizes} and multiples of {CUDA_TILE} in {k.dtype})"
        )
    return reasons
