"""Attention on CPUs in C++: tiles of scores stay in the cache, products in registers."""

import jax
import numpy as np

from fnml.pallas_kernels.attention._tiles import Extras, Plan
from fnml.pallas_kernels.native import call, floats, in_use


def forward(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras
) -> tuple[jax.Array, jax.Array]:
    """Return the output [B, T, H, D] and each row's log of its sum of exponentials [B, H, T]."""
    B, T, H, _ = q.shape
    results = (floats(*q.shape), floats(B, H, T))
    out, log = call("fnml_attention_forward", results, q, k, v, **_attributes(plan))
    return out, log


def backward(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    out: jax.Array,
    log: jax.Array,
    grad: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Return the gradients of q, k and v, and none of a bias."""
    results = (floats(*q.shape), floats(*k.shape), floats(*v.shape))
    operands = (q, k, v, out, log, grad)
    grad_q, grad_k, grad_v = call(
        "fnml_attention_backward", results, *operands, **_attributes(plan)
    )
    return grad_q, grad_k, grad_v, None


def _attributes(plan: Plan) -> dict[str, np.generic | bool]:
    reach = {"left": plan.left, "right": plan.right}
    bounds = {side: np.int64(-1 if n is None else n) for side, n in reach.items()}
    return {"scale": np.float32(plan.scale), "tiles": in_use().tiles, **bounds}
