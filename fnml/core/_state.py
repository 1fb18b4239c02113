"""Everything a training run carries from step to step."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """The whole of a run between two steps, as one pytree.

    Attributes:
      step: int32 scalar, the number of steps done.
      params: the model's parameters.
      opt_state: the optimizer's state.
      key: the run's typed key; a step uses ``step_key(key, step)``, so it never changes.
      model_state: the model's own state (BatchNorm); ``()`` for models without.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    key: jax.Array
    model_state: PyTree = ()

    @staticmethod
    def create(params: PyTree, optimizer: Any, key: jax.Array, model_state: PyTree = ()) -> "State":
        """Start a run: step 0, with the optimizer's initial state for ``params``.

        >>> import jax, optax
        >>> int(State.create({}, optax.sgd(0.1), jax.random.key(0)).step)
        0
        """
        return State(jnp.zeros((), jnp.int32), params, optimizer.init(params), key, model_state)
