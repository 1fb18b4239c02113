"""Layer normalisation."""

import jax
import jax.numpy as jnp
from jax import lax

from fnml.models._broadcast import along_last
from fnml.models._wide import wide


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array | None = None, *, eps: float = 1e-5
) -> jax.Array:
    """Return ``(x - mean) / sqrt(var + eps) * scale + bias`` over the last axis of ``x`` [..., D].

    ``scale`` and ``bias`` are [D]. Computed in at least float32, returned in the dtype of ``x``.

    Law: ``layer_norm(x + c, ...) == layer_norm(x, ...)`` for a number c, to rounding.

    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450, equations 3 and 4.

    Raises:
      ShapeError: ``scale`` or ``bias`` is not [D].

    >>> import jax.numpy as jnp
    >>> layer_norm(jnp.array([1.0, 3.0]), jnp.ones(2), jnp.zeros(2), eps=0.0).tolist()
    [-1.0, 1.0]
    """
    full = x.astype(wide(x.dtype))
    centred = full - jnp.mean(full, -1, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + eps)
    out = centred * inverse * along_last("layer_norm scale", scale, full)
    if bias is not None:
        out = out + along_last("layer_norm bias", bias, full)
    return out.astype(x.dtype)
