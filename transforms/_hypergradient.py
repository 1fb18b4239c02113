"""Differentiate through training: what should the rate, the decay, the data weights be?"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnml.core import step_key

PyTree = Any


def hypergradient(
    update: Callable[[PyTree, PyTree, PyTree, jax.Array], PyTree],
    outer: Callable[[PyTree], jax.Array],
) -> Callable[..., tuple[jax.Array, PyTree]]:
    """Differentiate a held-out loss after K training steps with respect to hyperparameters.

    The steps are unrolled in time by ``lax.scan`` and each is recomputed in the backward pass, so
    memory holds K copies of what ``update`` carries and one step's activations.

    Law: ``hypergradient(update, outer)(hyper, carry, batches, key)`` equals
    ``jax.value_and_grad`` of the K steps written out, up to rounding.

    Args:
      update: ``update(hyper, carry, batch, key) -> carry``, one training step that is
        differentiable in ``hyper`` (learning rate, decay, a weight for each example, ...);
        ``carry`` holds the parameters and, for optimizers with state, the state too.
      outer: ``outer(carry) -> loss``, the held-out loss after the last step.

    Returns:
      ``f(hyper, carry, batches, key) -> (loss, grads)`` with ``batches`` stacked ``[K, ...]`` and
      ``grads`` like ``hyper``; step ``k`` uses ``step_key(key, k)``.

    Source: Maclaurin et al. 2015, "Gradient-based hyperparameter optimization through reversible
    learning" (here with recomputation instead of reversal).

    >>> import jax, jax.numpy as jnp
    >>> def update(rate, w, x, key):
    ...     return w - rate * jax.grad(lambda w: (w - x) ** 2)(w)
    >>> tune = hypergradient(update, lambda w: (w - 1.0) ** 2)
    >>> loss, slope = tune(jnp.float32(0.1), jnp.float32(0.0), jnp.ones(2), jax.random.key(0))
    >>> round(float(loss), 4), round(float(slope), 4)
    (0.4096, -4.096)
    """

    def trained(hyper: PyTree, carry: PyTree, batches: PyTree, key: jax.Array) -> jax.Array:
        @jax.checkpoint
        def step(carry: PyTree, inputs: tuple[jax.Array, PyTree]) -> tuple[PyTree, None]:
            k, batch = inputs
            return update(hyper, carry, batch, step_key(key, k)), None

        count = len(jax.tree.leaves(batches)[0])
        steps = jnp.arange(count, dtype=jnp.int32)
        return outer(lax.scan(step, carry, (steps, batches))[0])

    return jax.value_and_grad(trained)
