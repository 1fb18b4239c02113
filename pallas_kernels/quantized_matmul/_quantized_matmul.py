"""A product with a matrix that is kept in 8 or 4 bits."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnml.pallas_kernels._compiler import hopper_faults
from fnml.pallas_kernels._implementation import Choice, Implementation, choose, refuse, run
from fnml.pallas_kernels.quantized_matmul import _lax
from fnml.pallas_kernels.quantized_matmul._blocks import CUDA_M, cuda_tiles, tpu_tiles
from fnml.pallas_kernels.quantized_matmul._packed import Layout, Packed
from fnml.pallas_kernels.quantized_matmul._reference import reference


def _tpu_forward(x: jax.Array, packed: Packed, **options: Any) -> jax.Array:
    from fnml.pallas_kernels.quantized_matmul import _tpu

    return _tpu.forward(x, packed, **options)


def _tpu_backward(grad: jax.Array, packed: Packed, **options: Any) -> jax.Array:
    from fnml.pallas_kernels.quantized_matmul import _tpu

    return _tpu.backward(grad, packed, **options)


def _gpu_forward(x: jax.Array, packed: Packed, **options: Any) -> jax.Array:
    from fnml.pallas_kernels.quantized_matmul import _gpu

    return _gpu.forward(x, packed, **options)


def _gpu_backward(grad: jax.Array, packed: Packed, *, interpret: Any, **options: Any) -> jax.Array:
    """Return what the lax body does: few rows are for inference, which has no gradient."""
    return _lax.backward(grad, packed, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _matmul(
    x: jax.Array, packed: Packed, layout: Layout, out_dtype: Any, choice: Choice
) -> jax.Array:
    bodies: dict[str, Callable[..., Any]] = {
        "lax": functools.partial(_lax.forward, layout=layout, out_dtype=out_dtype),
        "tpu": functools.partial(_tpu_forward, layout=layout, out_dtype=out_dtype),
        "cuda": functools.partial(_gpu_forward, layout=layout, out_dtype=out_dtype),
    }
    return run(choice, bodies, x, packed)


def _forward(
    x: jax.Array, packed: Packed, layout: Layout, out_dtype: Any, choice: Choice
) -> tuple[jax.Array, tuple[Packed, jax.Array]]:
    # An empty array remembers the dtype that the gradient has to have.
    return _matmul(x, packed, layout, out_dtype, choice), (packed, jnp.zeros(0, x.dtype))


def _backward(
    layout: Layout,
    out_dtype: Any,
    choice: Choice,
    saved: tuple[Packed, jax.Array],
    grad: jax.Array,
) -> tuple[jax.Array, None]:
    packed, like = saved
    bodies: dict[str, Callable[..., Any]] = {
        "lax": functools.partial(_lax.backward, layout=layout, dtype=like.dtype),
        "tpu": functools.partial(_tpu_backward, layout=layout, dtype=like.dtype),
        "cuda": functools.partial(_gpu_backward, layout=layout, dtype=like.dtype),
    }
    return run(choice, bodies, grad, packed), None


_matmul.defvjp(_forward, _backward)


def quantized_matmul(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    *,
    bits: int = 8,
    out_dtype: Any = None,
    implementation: Implementation = "auto",
    interpret: Any = None,
) -> jax.Array:
    """Return ``x @ w`` for x [..., in] and a matrix w [in, out] that is kept in 8 or 4 bits.

    ``w = scale * (codes - zero)``: ``codes`` int8 (or uint8 with ``zero``) [in, out], for 4 bits
    uint8 [ceil(in / 2), out] with the first half of the rows in the low and the second in the high
    nibbles, 8 added where there is no ``zero``; ``scale`` and ``zero`` are [groups, out] for groups
    of in / groups consecutive rows. It is what :func:`fnml.transforms.quantize` stores.

    The numbers are computed in float32, rounded to the dtype of ``x`` and multiplied in it (the
    GPU's body does not round them), sums are at least float32; the result has the dtype of ``x``,
    or ``out_dtype``. Only a tile or a block of rows exists as numbers at any time. The matrix is a
    constant: gradients flow to ``x`` alone, and there is no forward mode.

    Law: equal to ``x @ w`` to rounding; gradient ``grad @ w.T``.

    Source: Frantar et al. 2022, arXiv:2210.17323, section 4 (products with codes as they lie).

    Args:
      implementation: see :data:`fnml.pallas_kernels.Implementation`.
      interpret: runs a Pallas body in its interpreter: ``"tpu"``, ``"cuda"`` or an interpreter's
        parameters.

    Raises:
      ValueError: shapes or dtypes do not fit together; all faults are listed.
      NotImplementedError: the chosen implementation has no body for this call.

    >>> import jax.numpy as jnp
    >>> codes, scale = jnp.array([[2, -4], [6, 0]], jnp.int8), jnp.array([[0.5, 0.25]])
    >>> quantized_matmul(jnp.array([1.0, 10.0]), codes, scale).tolist()
    [31.0, -1.0]
    """
    packed = Packed(codes, scale, zero)
    refuse("quantized_matmul", _faults(x, packed, bits))
    layout = Layout(bits, x.shape[-1], x.shape[-1] // scale.shape[0])
    rows = x.reshape(-1, x.shape[-1])
    dtype = jnp.dtype(out_dtype or x.dtype)
    choice = choose(
        "quantized_matmul",
        implementation,
        _refusals(rows, packed, layout),
        interpret=interpret,
        worth=layout.rows * codes.shape[1] >= 2**20,
    )
    if choice.only == "reference":
        out = reference(rows, packed, layout, dtype)
    else:
        out = _matmul(rows, packed, layout, dtype, choice)
    return out.reshape(*x.shape[:-1], codes.shape[1])


def _refusals(x: jax.Array, packed: Packed, layout: Layout) -> dict[str, list[str]]:
    """Say for each body why it cannot multiply x [M, in]; an empty list if it can."""
    M, outputs = x.shape[0], packed.codes.shape[1]
    sizes = f"in={layout.rows}, out={outputs} and groups of {layout.group} rows have no tiles"
    tpu, cuda = [], hopper_faults()
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        tpu.append(f"x is {x.dtype}, expected float32 or bfloat16")
    if x.size == 0 or tpu_tiles(layout, M, outputs) is None:
        tpu.append(
            f"{sizes}: expected outputs, and the rows of codes, in multiples of 128 that groups "
            "divide"
        )
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        cuda.append(f"x is {x.dtype}, expected float32, bfloat16 or float16")
    if not 0 < M <= CUDA_M:
        cuda.append(f"x has {M} rows (it takes 1 to {CUDA_M})")
    elif x.size == 0 or cuda_tiles(layout, M, outputs) is None:
        cuda.append(
            f"{sizes}: expected outputs in multiples of 32, and rows of codes in multiples of 64 "
            "that groups divide"
        )
    return {"tpu": tpu, "cuda": cuda}


def _faults(x: jax.Array, packed: Packed, bits: int) -> list[str]:
    codes, scale, zero = packed
    if bits not in (4, 8):
        return [f"bits={bits}, expected 8 or 4"]
    faults = []
    if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        return [f"x is {x.dtype} {x.shape}, expected floats [..., in]"]
    expected = jnp.int8 if bits == 8 and zero is None else jnp.uint8
    rows = x.shape[-1] if bits == 8 else -(-x.shape[-1] // 2)
    if codes.ndim != 2 or codes.shape[0] != rows or codes.dtype != expected:
        faults.append(
            f"codes are {codes.dtype} {codes.shape}, expected {jnp.dtype(expected)} ({rows}, out) "
            f"for {bits} bits and x {x.shape}"
        )
    elif scale.ndim != 2 or scale.shape[1] != codes.shape[1] or x.shape[-1] % scale.shape[0]:
        faults.append(
            f"scale has shape {scale.shape}, expected (groups, {codes.shape[1]}) with groups that "
            f"divide the {x.shape[-1]} inputs"
        )
    if zero is not None and (zero.shape, zero.dtype) != (scale.shape, jnp.uint8):
        faults.append(f"zero is {zero.dtype} {zero.shape}, expected uint8 {scale.shape} like scale")
    return faults
