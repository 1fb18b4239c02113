"""The form for every platform: a few rows of the matrix become floats at a time."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnml.pallas_kernels._dtypes import wide
from fnml.pallas_kernels.quantized_matmul._blocks import lax_rows
from fnml.pallas_kernels.quantized_matmul._packed import Layout, Packed, numbers


def _split(x: jax.Array, layout: Layout, rows: int) -> jax.Array:
    """Cut x [M, in] to [blocks, parts, M, rows], with zeros where the last part is short."""
    M = x.shape[0]
    x = jnp.pad(x, ((0, 0), (0, layout.parts * layout.part - layout.rows)))
    return x.reshape(M, layout.parts, -1, rows).transpose(2, 1, 0, 3)


def forward(x: jax.Array, packed: Packed, *, layout: Layout, out_dtype: Any) -> jax.Array:
    """Return ``x @ dequantised`` for x [M, in]."""
    rows = lax_rows(layout, packed.codes.shape[1])
    sums = wide(x.dtype)

    def add(total: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        index, x = block
        codes = lax.dynamic_slice_in_dim(packed.codes, index * rows, rows, 0)
        for part in range(layout.parts):
            weight = numbers(packed, layout, codes, part, index * rows).astype(x.dtype)
            total = total + jnp.dot(x[part], weight, preferred_element_type=sums)
        return total, None

    blocks = _split(x, layout, rows)
    total = jnp.zeros((x.shape[0], packed.codes.shape[1]), sums)
    if blocks.shape[0] == 1:
        total, _ = add(total, (jnp.int32(0), blocks[0]))
    else:
        indices = jnp.arange(blocks.shape[0], dtype=jnp.int32)
        total, _ = lax.scan(add, total, (indices, blocks))
    return total.astype(out_dtype)


def backward(grad: jax.Array, packed: Packed, *, layout: Layout, dtype: Any) -> jax.Array:
    """Return the gradient of x [M, in] in ``dtype``, given that of the product [M, out]."""
    rows = lax_rows(layout, packed.codes.shape[1])
    grad = grad.astype(dtype)

    def one(index: jax.Array) -> jax.Array:
        codes = lax.dynamic_slice_in_dim(packed.codes, index * rows, rows, 0)
        weights = [
            numbers(packed, layout, codes, part, index * rows).astype(dtype)
            for part in range(layout.parts)
        ]
        return jnp.stack(
            [
                lax.dot_general(
                    grad, w, (((1,), (1,)), ((), ())), preferred_element_type=wide(dtype)
                ).astype(dtype)
                for w in weights
            ]
        )  # [parts, M, rows]

    count = layout.part // rows
    out = lax.map(one, jnp.arange(count, dtype=jnp.int32))  # [blocks, parts, M, rows]
    out = out.transpose(2, 1, 0, 3).reshape(grad.shape[0], -1)
    return lax.slice_in_dim(out, 0, layout.rows, axis=1)
