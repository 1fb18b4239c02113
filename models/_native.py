"""Whether a layer runs its C++ body."""

import jax
import jax.numpy as jnp

from fnml.core import divided
from fnml.pallas_kernels.native import active


def native_takes(*arrays: jax.Array) -> bool:
    """Tell whether C++ bodies are on here (:func:`fnml.pallas_kernels.native_kernels`) and take these.

    They take float32 arrays of one shape, with some numbers, that no compiler divides over devices.
    """
    # Numbers and NumPy's arrays have the plain form.
    if not active() or divided() or not all(isinstance(x, jax.Array) for x in arrays):
        return False
    shape = arrays[0].shape
    return all(isinstance(size, int) and size > 0 for size in shape) and all(
        x.shape == shape and x.dtype == jnp.float32 for x in arrays
    )
