"""The textbook form: all rows times all matrices, and each row takes its own."""

import jax
import jax.numpy as jnp

from fnml.pallas_kernels._dtypes import wide


def reference(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Return [N, F] for x [N, D] and w [E, D, F]."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])[None, :]
    own = (row >= (ends - group_sizes)[:, None]) & (row < ends[:, None])  # [E, N]
    each = jnp.einsum("nd,edf->enf", x, w.astype(x.dtype), preferred_element_type=wide(x.dtype))
    return jnp.sum(jnp.where(own[:, :, None], each, 0.0), axis=0).astype(x.dtype)
