"""Attention from the newest tokens to a cache."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnml.pallas_kernels._implementation import Implementation, choose, refuse, run
from fnml.pallas_kernels.decode_attention import _lax
from fnml.pallas_kernels.decode_attention._operands import Operands, Options
from fnml.pallas_kernels.decode_attention._reference import reference
from fnml.pallas_kernels.decode_attention._support import refusals


def _tpu_forward(operands: Operands, *, options: Options, interpret: Any) -> jax.Array:
    from fnml.pallas_kernels.decode_attention import _tpu

    return _tpu.forward(operands, options=options, interpret=interpret)


def _cuda_forward(operands: Operands, *, options: Options, interpret: Any) -> jax.Array:
    from fnml.pallas_kernels.decode_attention import _gpu

    return _gpu.forward(operands, options=options, interpret=interpret)


def decode_attention(
    q: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    lengths: jax.Array,
    page_table: jax.Array | None = None,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    implementation: Implementation = "auto",
    interpret: Any = None,
) -> jax.Array:
    """Return what the t newest tokens of each sequence read from its cache, [B, t, H, D].

    ``q`` is [B, t, H, D]. Sequence b has ``lengths[b]`` tokens in the cache, of which the last t
    are those of ``q``: each sees the keys up to its own. Query head h reads key head
    ``h // (H // K)``. Where a query sees no key, as with a length of 0, it reads zeros.

    The cache is whole, ``cache_k`` and ``cache_v`` [B, S, K, D], or in pages [P, page, K, D] with
    a ``page_table`` [B, pages] of int32: token i of sequence b lies in page
    ``page_table[b, i // page]``. It holds floats, or int8 codes with ``k_scale`` and ``v_scale``,
    float32 [B, K, S] or [P, K, page], as :func:`quantize_cache` makes them. The codes are
    multiplied as they are, and the products by the scales.

    Law: equal to :func:`attention`'s last t rows on the keys and values that the cache stands
    for; the order of pages and what lies in unused ones changes nothing.

    Source: Kwon et al. 2023, arXiv:2309.06180 (pages); Dao 2023, arXiv:2307.08691 (blocks).

    Args:
      window: how many keys a query sees, its own included; ``None`` for all.
      soft_cap: bounds scores to ``soft_cap * tanh(scores / soft_cap)``.
      implementation: see :data:`fnml.pallas_kernels.Implementation`.
      interpret: run a Pallas body in an interpreter, with ``implementation="pallas"``: "tpu",
        "cuda", or an interpreter's parameters.

    Raises:
      ValueError: shapes or dtypes do not fit together; all faults are listed.
      NotImplementedError: the chosen implementation has no body for this call.

    >>> import jax.numpy as jnp
    >>> q, cache = jnp.ones((2, 1, 4, 8)), jnp.ones((2, 10, 2, 8))
    >>> decode_attention(q, cache, cache, jnp.array([3, 10])).shape
    (2, 1, 4, 8)
    """
    operands = Operands(q, cache_k, cache_v, lengths, page_table, k_scale, v_scale)
    options = Options(window, soft_cap)
    refuse("decode_attention", _faults(operands, options))
    choice = choose(
        "decode_attention",
        implementation,
        refusals(operands),
        interpret=interpret,
        # A small cache is read faster by one fusion than by a grid over sequences.
        worth=cache_k.size * cache_k.dtype.itemsize >= 2**21,
    )
    if choice.only == "reference":
        return reference(operands, options)
    bodies: dict[str, Callable[..., Any]] = {
        "lax": functools.partial(_lax.forward, options=options),
        "tpu": functools.partial(_tpu_forward, options=options),
        "cuda": functools.partial(_cuda_forward, options=options),
    }
    return run(choice, bodies, operands)


def _faults(operands: Operands, options: Options) -> list[str]:
    q, k, v, lengths, table, *scales = operands
    faults = []
    if q.ndim != 4 or not jnp.issubdtype(q.dtype, jnp.floating):
        faults.append(f"q is {q.dtype} {q.shape}, expected floats [B, t, H, D]")
    kind = "[B, S, K, D]" if table is None else "[P, page, K, D]"
    if k.ndim != 4 or k.shape != v.shape or k.dtype != v.dtype:
        faults.append(
            f"cache_k is {k.dtype} {k.shape} and cache_v {v.dtype} {v.shape}, expected both {kind}"
        )
    if faults:
        return faults
    B, _, H, D = q.shape
    if k.shape[3] != D or H % k.shape[2] or (table is None and k.shape[0] != B):
        faults.append(
            f"q {q.shape} does not fit a cache {k.shape}: expected {kind} with B and D of q, and H "
            "a multiple of K"
        )
    if lengths.shape != (B,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        faults.append(f"lengths are {lengths.dtype} {lengths.shape}, expected integers {(B,)}")
    if table is not None:
        integers = jnp.issubdtype(table.dtype, jnp.integer)
        if table.ndim != 2 or table.shape[0] != B or not integers:
            faults.append(
                f"page_table is {table.dtype} {table.shape}, expected integers ({B}, pages)"
            )
    expected = (k.shape[0], k.shape[2], k.shape[1])
    for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
        if (scale is None) == (k.dtype == jnp.int8):
            faults.append(
                f"{name} is needed for a cache of int8, and only for that: it is {k.dtype}"
            )
        elif scale is not None and scale.shape != expected:
            faults.append(f"{name} has shape {scale.shape}, expected {expected}: time comes last")
    if options.window is not None and options.window < 1:
        faults.append(f"window={options.window}, expected 1 or more")
    if options.soft_cap is not None and not options.soft_cap > 0:
        faults.append(f"soft_cap={options.soft_cap}, expected more than 0")
    return faults
