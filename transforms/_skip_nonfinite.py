"""Skip the steps that would break a run."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnml.core import ConfigError, Mean, State

PyTree = Any
Step = Callable[[State, PyTree], tuple[State, dict[str, Mean]]]


def skip_nonfinite(step: Step) -> Step:
    """Undo a training step whose loss, parameters, optimizer or model state are not finite.

    A skipped step leaves parameters, optimizer state and model state as they were; the step
    counter still advances, so the next step draws other random numbers. The metrics of a skipped
    step weigh nothing, so means over many steps are those of the steps that counted. The metric
    ``"skipped"`` is the share of skipped steps.

    Only what the step itself made non-finite counts: an infinity that an optimizer starts from,
    such as a best loss so far, does not.

    Law: ``skip_nonfinite(step)(state, batch) == step(state, batch)`` where that is finite, bit for
    bit; elsewhere it is ``state`` with its counter advanced.

    Args:
      step: ``step(state, batch) -> (state, metrics)``.

    Returns:
      A function with the signature of ``step``. A fused step skips whole blocks: fuse what is
      skipped, ``fuse(skip_nonfinite(step), k)``, to skip single steps.

    Raises:
      ConfigError: the step has a metric ``"skipped"`` already (when called).

    >>> import jax, jax.numpy as jnp, optax
    >>> def step(state, x):
    ...     new = dataclasses.replace(state, step=state.step + 1, params=state.params / x)
    ...     return new, {"loss": Mean.of(x)}
    >>> state = State.create(jnp.float32(3.0), optax.sgd(1.0), jax.random.key(0))
    >>> new, metrics = skip_nonfinite(step)(state, jnp.float32(0.0))
    >>> float(new.params), int(new.step), float(metrics["skipped"].value)
    (3.0, 1, 1.0)
    """

    def guarded(state: State, batch: PyTree) -> tuple[State, dict[str, Mean]]:
        new, metrics = step(state, batch)
        if "skipped" in metrics:
            raise ConfigError(
                "the step has a metric 'skipped' already, the name under which skip_nonfinite "
                "reports: rename it, or apply skip_nonfinite once"
            )
        fine = _unbroken(_kept(state), _kept(new))
        if "loss" in metrics:
            fine &= jnp.all(jnp.isfinite(metrics["loss"].total))
        new, metrics = undo_unless(fine, state, new, metrics)
        one = jnp.ones((), jnp.float32)
        return new, {**metrics, "skipped": Mean(jnp.where(fine, 0 * one, one), one)}

    return guarded


def _unbroken(old: PyTree, new: PyTree) -> jax.Array:
    """Tell whether everything finite in ``old`` is finite in ``new``."""
    fine = [
        jnp.all(jnp.isfinite(y) | ~jnp.isfinite(x))
        for x, y in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
        if jnp.issubdtype(y.dtype, jnp.inexact)
    ]
    return jnp.all(jnp.stack(fine)) if fine else jnp.ones((), bool)


def all_finite(tree: PyTree) -> jax.Array:
    """Tell whether every number in a tree of arrays is finite, as a bool scalar."""
    return _unbroken(jax.tree.map(jnp.zeros_like, tree), tree)


def undo_unless(
    fine: jax.Array, state: State, new: State, metrics: Mapping[str, Mean]
) -> tuple[State, dict[str, Mean]]:
    """Return ``new`` and its metrics if ``fine``, else ``state`` with the counter of ``new``.

    The metrics of an undone step weigh nothing.
    """

    def keep() -> tuple[PyTree, dict[str, Mean]]:
        return _kept(new), dict(metrics)

    def undo() -> tuple[PyTree, dict[str, Mean]]:
        return _kept(state), jax.tree.map(jnp.zeros_like, dict(metrics))

    # A branch, because a select would be compiled into the step's last operations, and there
    # changes how they round.
    kept, counted = lax.cond(fine, keep, undo)
    return dataclasses.replace(new, **kept), counted


def _kept(state: State) -> dict[str, PyTree]:
    return {name: getattr(state, name) for name in ("params", "opt_state", "model_state")}
