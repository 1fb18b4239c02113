"""The textbook form: the whole matrix as floats."""

from typing import Any

import jax
import jax.numpy as jnp

from fnml.pallas_kernels._dtypes import wide
from fnml.pallas_kernels.quantized_matmul._packed import Layout, Packed, dequantize


def reference(x: jax.Array, packed: Packed, layout: Layout, out_dtype: Any) -> jax.Array:
    """Return ``x @ dequantised`` for x [M, in]."""
    weight = dequantize(packed, layout).astype(x.dtype)
    return jnp.dot(x, weight, preferred_element_type=wide(x.dtype)).astype(out_dtype)
