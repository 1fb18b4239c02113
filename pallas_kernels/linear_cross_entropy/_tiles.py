"""The maths of one tile of logits, shared by every body of the kernel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Plan(NamedTuple):
    """What is known of a call while tracing; hashable.

    Attributes:
      classes: V. ``smoothing``: of the labels. ``z_loss``: the factor of ``log(Z) ** 2``.
      chunk: the number of tokens whose logits the lax body holds at once.
    """

    classes: int
    smoothing: float
    z_loss: float
    chunk: int


def loss(plan: Plan, log: jax.Array, chosen: jax.Array, mean: jax.Array) -> jax.Array:
    """Return the loss from log(Z), the label's logit and the mean of all logits."""
    if plan.smoothing:
        chosen = (1 - plan.smoothing) * chosen + plan.smoothing * mean
    out = log - chosen
    return out + plan.z_loss * log * log if plan.z_loss else out


def slope(
    plan: Plan, probability: jax.Array, log: jax.Array, hit: jax.Array, weight: jax.Array
) -> jax.Array:
    """Return the derivative of the weighted loss by the logits of a tile.

    ``hit`` says where a logit is its row's label; ``log`` and ``weight`` broadcast along rows.
    """
    rise = weight * (1 + 2 * plan.z_loss * log) if plan.z_loss else weight
    out = probability * rise - jnp.where(hit, weight * (1 - plan.smoothing), 0.0)
    return out - weight * (plan.smoothing / plan.classes) if plan.smoothing else out
