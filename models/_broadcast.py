"""Broadcast per-feature vectors without relying on rank promotion."""

import jax

from fnml.core import ShapeError


def check_last(what: str, vector: jax.Array, x: jax.Array) -> None:
    """Refuse a ``vector`` that is not [D] for ``x`` [..., D].

    Raises:
      ShapeError: the shapes differ; ``what`` says whose vector it is.
    """
    if vector.shape != x.shape[-1:]:
        raise ShapeError(f"{what} has shape {vector.shape}: expected {x.shape[-1:]} for {x.shape}")


def along_last(what: str, vector: jax.Array, x: jax.Array) -> jax.Array:
    """Give ``vector`` [D] the rank and dtype of ``x`` [..., D].

    Raises:
      ShapeError: ``vector`` is not [D]; ``what`` says whose vector it is.
    """
    check_last(what, vector, x)
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + vector.shape)
