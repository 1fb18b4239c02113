"""The dtype in which sums are taken."""

from typing import Any

import jax.numpy as jnp


def wide(dtype: Any) -> Any:
    """Return float32 for floats narrower than it, else ``dtype``.

    >>> wide(jnp.bfloat16), wide(jnp.float32)
    (dtype('float32'), dtype('float32'))
    """
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
