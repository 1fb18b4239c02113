"""What each hand-written body can do."""

import jax
import jax.numpy as jnp

from fnml.pallas_kernels._compiler import hopper_faults
from fnml.pallas_kernels.attention._blocks import CUDA, NATIVE_QUERIES
from fnml.pallas_kernels.attention._tiles import Extras, Plan
from fnml.pallas_kernels.native import faults_of


def refusals(plan: Plan, q: jax.Array, k: jax.Array, extras: Extras) -> dict[str, list[str]]:
    """Say for each body why it cannot run this call; an empty list if it can."""
    return {
        "tpu": _tpu(q, k, extras),
        "cuda": _cuda(plan, q, k, extras),
        "native": _native(plan, q, k, extras),
    }


def _tpu(q: jax.Array, k: jax.Array, extras: Extras) -> list[str]:
    B, T, H, D = q.shape
    S = k.shape[1]
    faults = []
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        faults.append(f"dtype {q.dtype} (it takes float32 and bfloat16)")
    if D > 256 or D % 8:
        faults.append(f"head width {D} (it takes multiples of 8 up to 256)")
    if extras.bias is not None and extras.bias.shape != (B, H, T, S):
        faults.append(
            f"bias {extras.bias.shape} (it takes {(B, H, T, S)}: the gradient of a broadcast bias "
            "would be a sum over an array of T x S per head)"
        )
    if extras.mask is not None and extras.mask.shape[2:] != (T, S):
        faults.append(f"mask {extras.mask.shape} (it takes [B | 1, H | 1, {T}, {S}])")
    return faults


def _cuda(plan: Plan, q: jax.Array, k: jax.Array, extras: Extras) -> list[str]:
    T, D = q.shape[1], q.shape[3]
    S = k.shape[1]
    faults = hopper_faults()
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        faults.append(f"dtype {q.dtype} (it takes float16 and bfloat16)")
    if D not in CUDA:
        faults.append(f"head width {D} (it takes {', '.join(map(str, CUDA))})")
    if plan.left is not None and D > 64:
        faults.append(f"window at head width {D} (its gradient would spill registers)")
    if T % 128 or S % 128:
        faults.append(f"lengths T={T}, S={S} (it takes multiples of 128)")
    return faults + _without(plan, extras)


def _native(plan: Plan, q: jax.Array, k: jax.Array, extras: Extras) -> list[str]:
    found = faults_of(q=q, k=k) + _without(plan, extras)
    if all(isinstance(n, int) for n in (*q.shape, *k.shape)):
        T, D = q.shape[1], q.shape[3]
        if D % 16 or D > 256:
            found.append(f"head width {D} (it takes multiples of 16 up to 256)")
        if T < NATIVE_QUERIES:
            found.append(f"{T} queries (it takes {NATIVE_QUERIES} or more)")
    return found


def _without(plan: Plan, extras: Extras) -> list[str]:
    """Name what is asked for, where a body takes bounds of the window at most."""
    names = {
        "segment_ids or lengths": extras.q_segments,
        "bias": extras.bias,
        "mask": extras.mask,
        "dropout": extras.seed,
        "soft_cap": plan.soft_cap,
    }
    return [f"{name} (it has none)" for name, x in names.items() if x is not None]
