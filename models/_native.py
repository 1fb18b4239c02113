"""Whether a layer runs its C++ body."""

import jax

from fnml.core import divided
from fnml.pallas_kernels.native import active, faults_of


def native_takes(*arrays: jax.Array) -> bool:
    """Tell whether C++ bodies are on here (:func:`fnml.pallas_kernels.native_kernels`) and take these.

    They take float32 arrays of one shape, with some numbers, that no compiler divides over devices.
    """
    # Numbers and NumPy's arrays have the plain form.
    if not active() or divided() or not all(isinstance(x, jax.Array) for x in arrays):
        return False
    named = {str(number): x for number, x in enumerate(arrays)}
    return all(x.shape == arrays[0].shape for x in arrays) and not faults_of(**named)
