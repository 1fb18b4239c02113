"""The public function: checks, the choice of a body, and the derivative."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fnml.pallas_kernels._implementation import (
    Bodies,
    Choice,
    Implementation,
    choose,
    refuse,
    run,
)
from fnml.pallas_kernels.attention import _by_head, _cudnn, _native, _reference
from fnml.pallas_kernels.attention._blocks import WORTH
from fnml.pallas_kernels.attention._support import refusals
from fnml.pallas_kernels.attention._tiles import HIDDEN, Extras, Plan


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    window: int | tuple[int, int] | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    lengths: jax.Array | None = None,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    implementation: Implementation = "auto",
    interpret: Any = None,
) -> jax.Array:
    """Return ``softmax(q . k * scale) v`` in memory linear in T and S.

    ``q`` is [B, T, H, D]; ``k`` and ``v`` are [B, S, K, D] with H a multiple of K: query head h
    reads key head ``h // (H // K)``. The output is [B, T, H, D] in the one dtype of all three;
    scores, sums and the softmax are at least float32. A query that may see no key gets 0.

    Args:
      causal: whether query t sees keys s <= t only.
      window: how many keys to the left and to the right of its own position a query sees beside
        it; one number for both.
      segment_ids: integers of 0 or more, [B, T] for queries and keys, or a pair of [B, T] and
        [B, S]. A query sees the keys of its own segment.
      lengths: integers [B], the number of keys of each row that there are; the rest is padding.
      bias: floats [B | 1, H | 1, T | 1, S | 1], added to the scaled and capped scores.
      mask: bools of such a shape, False where a query does not see a key.
      soft_cap: ``c`` for scores bounded as ``c * tanh(score / c)``.
      scale: of the scores; ``None`` for ``D ** -0.5``.
      dropout: the share of the weights dropped, in [0, 1); only with a ``key``. What is dropped
        depends on the key and the position alone: every implementation drops the same.
      key: the random key of dropout.
      implementation: see :data:`fnml.pallas_kernels.Implementation`. "auto" takes a Pallas
        kernel from 512 queries and keys on; below, TPUs and GPUs take all scores at once, where
        CPUs go in blocks. docs/kernels.md lists what runs where.
      interpret: run a Pallas body in an interpreter, with ``implementation="pallas"``: "tpu",
        "cuda", or an interpreter's parameters.

    All but the reference have a custom VJP and thus no forward mode (``jax.jvp``); second
    derivatives go through the lax body, and cuDNN has none.

    Law: changing keys and values that a query does not see changes no bit of its output, as long
    as they are finite (the weight 0 of a NaN is NaN).

    Source: Dao 2023, arXiv:2307.08691, algorithms 1 and 2; groups: Ainslie et al. 2023,
    arXiv:2305.13245; soft cap: Gemma Team 2024, arXiv:2408.00118, section 2.

    Raises:
      ValueError: shapes, dtypes or options do not fit together; all of it is named.
      NotImplementedError: the implementation asked for cannot do this; the message says why.

    >>> import jax.numpy as jnp
    >>> q, k = jnp.ones((2, 100, 4, 8)), jnp.ones((2, 100, 2, 8))
    >>> attention(q, k, k, causal=True, window=(16, 0)).shape
    (2, 100, 4, 8)
    """
    faults = _faults(q, k, v, causal, window, segment_ids, lengths, bias, mask)
    faults += _option_faults(soft_cap, dropout, key)
    refuse("attention", faults)
    (B, T), S = q.shape[:2], k.shape[1]
    left, right = (window, window) if isinstance(window, int) else window or (None, None)
    if causal:
        right = 0
    # A symbolic size (jax.export) is no number that blocks could be cut by.
    known = isinstance(T, int) and isinstance(S, int)
    plan = Plan(
        scale=q.shape[3] ** -0.5 if scale is None else scale,
        # A reach beyond either end is no bound.
        left=None if left is None or (known and left >= T - 1) else left,
        right=None if right is None or (known and right >= S - 1) else right,
        soft_cap=soft_cap,
        rate=0.0 if key is None else dropout,
    )
    own: jax.Array | None
    other: jax.Array | None
    own, other = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    if lengths is not None:
        own = jnp.zeros((B, T), jnp.int32) if own is None else own
        other = jnp.zeros((B, S), jnp.int32) if other is None else other
        there = jnp.arange(S, dtype=jnp.int32)[None, :] < lengths[:, None].astype(jnp.int32)
        other = jnp.where(there, other.astype(jnp.int32), HIDDEN)
    seed = None
    if key is not None and dropout:
        seed = jax.lax.bitcast_convert_type(jax.random.bits(key, (2,), jnp.uint32), jnp.int32)
    extras = Extras(
        None if own is None else own.astype(jnp.int32),
        None if other is None else other.astype(jnp.int32),
        bias,
        mask,
        seed,
    )
    if not known and implementation == "auto":
        return _reference.attention(plan, q, k, v, extras)
    choice = choose(
        "attention",
        implementation,
        {
            **refusals(plan, q, k, extras),
            "cudnn": _cudnn.faults(plan, q, k, extras, segment_ids, lengths),
        },
        interpret=interpret,
        worth=min(T, S) >= WORTH,
    )
    if choice.only == "reference":
        return _reference.attention(plan, q, k, v, extras)
    if choice.only == "cudnn":
        return _cudnn.attention(plan, q, k, v, bias, lengths)
    return _attention(choice, plan, q, k, v, extras)


def _faults(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    causal: bool,
    window: int | tuple[int, int] | None,
    segment_ids: Any,
    lengths: jax.Array | None,
    bias: jax.Array | None,
    mask: jax.Array | None,
) -> list[str]:
    """Say what does not fit among the arrays."""
    fits = (
        q.ndim == k.ndim == 4
        and k.shape == v.shape
        and q.shape[0] == k.shape[0]
        and q.shape[3] == k.shape[3]
        and q.shape[2] % k.shape[2] == 0
        and q.dtype == k.dtype == v.dtype
        and jnp.issubdtype(q.dtype, jnp.floating)
    )
    if not fits:
        found = f"got q {q.dtype} {q.shape}, k {k.dtype} {k.shape}, v {v.dtype} {v.shape}"
        expected = "one floating dtype, q [B, T, H, D] and k, v [B, S, K, D] with H a multiple of K"
        return [f"{found}: expected {expected}"]
    (B, T, H, _), S, faults = q.shape, k.shape[1], []
    if window is not None:
        sides = (window, window) if isinstance(window, int) else window
        if len(sides) != 2 or any(not isinstance(n, int) or n < 0 for n in sides):
            faults.append(f"window={window!r}: expected a number of 0 or more, or a pair of them")
        elif causal and not isinstance(window, int) and window[1]:
            faults.append(f"window={window!r} with causal=True: nothing is seen to the right")
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    if segment_ids is not None:
        shapes = tuple(x.shape for x in pair)
        whole = all(jnp.issubdtype(x.dtype, jnp.integer) for x in pair)
        if shapes != ((B, T), (B, S)) or not whole:
            found = ", ".join(f"{x.dtype} {x.shape}" for x in pair)
            faults.append(f"segment_ids {found}: expected integers {(B, T)} and {(B, S)}")
    if lengths is not None and not (
        lengths.shape == (B,) and jnp.issubdtype(lengths.dtype, jnp.integer)
    ):
        faults.append(f"lengths {lengths.dtype} {lengths.shape}: expected integers {(B,)}")
    for name, x, kind in (("bias", bias, jnp.floating), ("mask", mask, jnp.bool_)):
        if x is None:
            continue
        sizes = zip(x.shape, (B, H, T, S), strict=False)
        if x.ndim != 4 or any(n not in (1, full) for n, full in sizes):
            faults.append(f"{name} {x.shape}: expected {(B, H, T, S)}, each size that or 1")
        if not jnp.issubdtype(x.dtype, kind):
            faults.append(f"{name} of {x.dtype}: expected {kind.__name__.strip('_')}")
    return faults


def _option_faults(soft_cap: float | None, dropout: float, key: jax.Array | None) -> list[str]:
    faults = []
    if soft_cap is not None and not soft_cap > 0:
        faults.append(f"soft_cap={soft_cap}: expected more than 0")
    if not 0 <= dropout < 1:
        faults.append(f"dropout={dropout}: expected 0 or more, and below 1")
    return faults


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    choice: Choice, plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras
) -> jax.Array:
    return _forward(choice, plan, q, k, v, extras)[0]


def _forward(
    choice: Choice, plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras
) -> tuple[jax.Array, tuple]:
    def tpu(*operands: Any, interpret: Any) -> Any:
        from fnml.pallas_kernels.attention import _tpu

        return _tpu.forward(plan, *operands, interpret=interpret)

    def cuda(*operands: Any, interpret: Any) -> Any:
        from fnml.pallas_kernels.attention import _gpu

        return _gpu.forward(plan, *operands, interpret=interpret)

    bodies: Bodies = {
        "lax": partial(_by_head.forward, plan),
        "native": partial(_native.forward, plan),
        "tpu": tpu,
        "cuda": cuda,
    }
    out, log = run(choice, bodies, q, k, v, extras)
    return out, (q, k, v, extras, out, log)


def _backward(
    choice: Choice, plan: Plan, residuals: tuple, grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, Extras]:
    def tpu(*operands: Any, interpret: Any) -> Any:
        from fnml.pallas_kernels.attention import _tpu_backward

        return _tpu_backward.backward(plan, *operands, interpret=interpret)

    def cuda(*operands: Any, interpret: Any) -> Any:
        from fnml.pallas_kernels.attention import _gpu_backward

        return _gpu_backward.backward(plan, *operands, interpret=interpret)

    bodies: Bodies = {
        "lax": partial(_by_head.backward, plan),
        "native": partial(_native.backward, plan),
        "tpu": tpu,
        "cuda": cuda,
    }
    grad_q, grad_k, grad_v, grad_bias = run(choice, bodies, *residuals, grad)
    bias = residuals[3].bias
    if bias is not None:
        grad_bias = grad_bias.astype(bias.dtype)
    return grad_q, grad_k, grad_v, Extras(bias=grad_bias)


_attention.defvjp(_forward, _backward)
