"""Means that merge exactly: a total, and the weight it was summed over."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from fnml.core._errors import ShapeError

PyTree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean:
    """A mean kept as ``total`` and ``weight``, so that parts of a batch merge exactly.

    Both are float32 scalars in metrics; model statistics hold arrays of one shape.

    Law: the mean over a batch is ``merge`` of the means over its parts, whatever their sizes.

    >>> import jax.numpy as jnp
    >>> a, b = Mean(jnp.float32(6), jnp.float32(2)), Mean(jnp.float32(1), jnp.float32(1))
    >>> float((a + b).value)
    2.3333332538604736
    """

    total: jax.Array
    weight: jax.Array

    @property
    def value(self) -> jax.Array:
        """``total / weight``; the total, which is 0, where nothing was counted."""
        return self.total / jnp.where(self.weight == 0, jnp.ones_like(self.weight), self.weight)

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    @staticmethod
    def of(values: jax.Array, weights: jax.Array | None = None) -> "Mean":
        """Sum ``values`` of any shape, weighted by ``weights`` of the same shape (default 1).

        Where a weight is 0 the value does not count, even if it is NaN.

        Raises:
          ShapeError: the shapes differ.
        """
        values = values.astype(jnp.float32)
        if weights is None:
            return Mean(jnp.sum(values), jnp.asarray(values.size, jnp.float32))
        if weights.shape != values.shape:
            raise ShapeError(
                f"weights of shape {weights.shape} for values of shape {values.shape}: give each value its "
                "own weight, nothing is broadcast"
            )
        weights = weights.astype(jnp.float32)
        kept = jnp.where(weights == 0, jnp.zeros_like(values), values)
        return Mean(jnp.sum(kept * weights), jnp.sum(weights))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metrics:
    """What a loss function returns beside the loss.

    Attributes:
      weight: float32 scalar, what the loss is a mean over: examples, or unmasked tokens.
      values: named :class:`Mean` pairs, shown to the user.
      stats: model statistics (BatchNorm) as a tree of :class:`Mean` with the structure of the
        model's state; ``()`` for models without state.

    Law: layout transforms merge ``values`` and ``stats`` by addition and the loss by ``weight``.
    """

    weight: jax.Array
    values: Mapping[str, Mean] = field(default_factory=dict)
    stats: PyTree = ()
