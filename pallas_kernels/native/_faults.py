"""What the C++ bodies cannot take."""

import jax
import jax.numpy as jnp

from fnml.pallas_kernels._varying import varying
from fnml.pallas_kernels.native._scope import unavailable


def faults_of(**arrays: jax.Array) -> list[str]:
    """Say why C++ does not take these arrays, float32 of known sizes; nothing if it does."""
    found = unavailable()
    for name, x in arrays.items():
        if x.dtype != jnp.float32:
            found.append(f"{name} is {x.dtype}, expected float32")
        if not all(isinstance(size, int) and size > 0 for size in x.shape):
            found.append(f"{name} is {x.shape}, expected some numbers, known how many")
        if axes := varying(x):
            found.append(f"{name} varies along {axes}, expected check_vma=False in shard_map")
    return found
