"""Train several members at once: other seeds, other rates, one program."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax import lax

from fnml.core import ConfigError, State, nearest

PyTree = Any
Step = Callable[[State, PyTree], tuple[State, PyTree]]


def population(step: Step, *, mode: Literal["vmap", "map"] = "vmap", stacked: bool = False) -> Step:
    """Do a training step for each member of a population.

    Members are states stacked along a leading axis N, made for example with
    ``jax.vmap(lambda key: State.create(init(model.spec, key), optimizer, key))(keys)``. What
    differs between them may be anything a state holds: parameters, keys, or hyperparameters kept
    in the optimizer's state (``optax.inject_hyperparams``).

    Law: with ``mode="map"`` each member has the bits of ``step`` run alone; with ``mode="vmap"``,
    which is faster, it equals it up to rounding, since batched products round differently.

    Args:
      step: ``step(state, batch) -> (state, metrics)``.
      mode: ``"vmap"`` computes all members together, ``"map"`` one after the other.
      stacked: whether the batch has a leading axis N too, a batch for each member; otherwise all
        members see the same one.

    Returns:
      ``step(states, batch) -> (states, metrics)`` with a leading axis N on every array.

    Raises:
      ConfigError: the mode is unknown.

    >>> import jax.numpy as jnp
    >>> grow = population(lambda state, batch: (state * batch, state))
    >>> grow(jnp.array([1.0, 2.0]), jnp.float32(3.0))[0].tolist()
    [3.0, 6.0]
    """
    if mode not in ("vmap", "map"):
        raise ConfigError(
            f"population's mode is 'vmap' or 'map', got {mode!r}.{nearest(mode, ['vmap', 'map'])}"
        )

    def together(states: State, batch: PyTree) -> tuple[State, PyTree]:
        return jax.vmap(step, in_axes=(0, 0 if stacked else None))(states, batch)

    def apart(state: State, batch: PyTree) -> tuple[State, PyTree]:
        # Fused with the slices that pick a member, a step's operations would round differently.
        return lax.optimization_barrier(step(*lax.optimization_barrier((state, batch))))

    def in_turn(states: State, batch: PyTree) -> tuple[State, PyTree]:
        if stacked:
            return lax.map(lambda both: apart(*both), (states, batch))
        return lax.map(lambda state: apart(state, batch), states)

    return together if mode == "vmap" else in_turn
