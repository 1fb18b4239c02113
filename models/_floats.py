"""Refuse integers where numbers are multiplied with weights."""

import jax
import jax.numpy as jnp

from fnml.core import ShapeError


def refuse_integers(layer: str, x: jax.Array) -> None:
    """Refuse an input that is not floating-point: the weights would be rounded to its dtype.

    Raises:
      ShapeError: ``x`` holds integers or booleans.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ShapeError(
            f"{layer} got x of {x.dtype}: convert it first, as in "
            "x.astype(jnp.float32) / 255 for images of bytes"
        )
