"""An Optax optimizer from configuration."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fnml.core import ConfigError, mask, nearest
from fnml.train._in_place import adam_in_place, adamw, after

PyTree = Any


@dataclass(frozen=True)
class OptimizerConfig:
    """Say how parameters are updated: AdamW, Adam or SGD with a schedule, clipping and decay.

    Raises:
      ConfigError: a value is out of range; all of them are listed.
    """

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    """The update rule."""
    learning_rate: float = 3e-3
    """The peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls from its peak to final_fraction of it over the run."""
    warmup: int = 100
    """Steps of linear warm-up; step ``i`` has the rate ``(i + 1) / (warmup + 1)`` of the peak."""
    final_fraction: float = 0.0
    """The last learning rate, as a fraction of the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay (adamw), on the parameters that decay selects."""
    decay: tuple[str, ...] = ()
    """Path globs of the parameters that decay; empty: all with two or more dimensions."""
    b1: float = 0.9
    """Adam's first moment decay, or SGD's momentum."""
    b2: float = 0.999
    """Adam's second moment decay."""
    clip: float = 0.0
    """Largest global gradient norm; 0 for no clipping."""

    def __post_init__(self) -> None:
        names = ("adamw", "adam", "sgd")
        schedules = ("cosine", "linear", "constant")
        faults = [
            f"{name}={value!r}: expected {' or '.join(options)}.{nearest(value, options)}"
            for name, value, options in (
                ("name", self.name, names),
                ("schedule", self.schedule, schedules),
            )
            if value not in options
        ]
        faults += [
            f"{name}={value}: expected {expected}"
            for name, value, fine, expected in (
                ("learning_rate", self.learning_rate, self.learning_rate > 0, "more than 0"),
                ("warmup", self.warmup, self.warmup >= 0, "at least 0"),
                ("final_fraction", self.final_fraction, 0 <= self.final_fraction <= 1, "0 to 1"),
                ("weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0"),
                ("b1", self.b1, 0 <= self.b1 < 1, "0 to below 1"),
                ("b2", self.b2, 0 <= self.b2 < 1, "0 to below 1"),
                ("clip", self.clip, self.clip >= 0, "at least 0"),
            )
            if not fine
        ]
        if faults:
            raise ConfigError("optimizer: " + "; ".join(faults))


def _schedule(config: OptimizerConfig, steps: int) -> Callable[[Any], Any]:
    peak, warmup = config.learning_rate, min(config.warmup, max(steps - 1, 0))
    last, rest = peak * config.final_fraction, max(steps - warmup, 1)
    falls = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, last, rest),
        "constant": lambda: optax.constant_schedule(peak),
    }
    fall = falls[config.schedule]()
    if warmup == 0:
        return fall
    # Step 0 already learns: a rate of exactly 0 would waste its batch.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, fall], [warmup])


def optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Build the optimizer that a configuration describes, for a run of ``steps`` steps.

    In a step within :func:`fnml.transforms.native`, Adam and AdamW over float32 parameters run in C++
    on a CPU.

    Raises:
      ConfigError: a decay glob matches no parameter (when the optimizer is initialised).

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    >>> tx = optimizer(OptimizerConfig(warmup=0), steps=10)
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> round(float(updates["bias"][0]), 6)
    -0.003
    """
    rate = _schedule(config, steps)

    def decays(params: PyTree) -> PyTree:
        if config.decay:
            return mask(params, config.decay)
        return jax.tree.map(lambda p: p.ndim > 1, params)

    def no_decays(params: PyTree) -> PyTree:
        return jax.tree.map(lambda p: 0.0, params)

    moments, eps = (rate, config.b1, config.b2), 1e-8
    rules = {
        "adamw": lambda: adamw(*moments, eps, weight_decay=config.weight_decay, mask=decays),
        "adam": lambda: adam_in_place(optax.adam(*moments, eps), *moments, eps, no_decays),
        "sgd": lambda: optax.sgd(rate, config.b1 or None),
    }
    rule = rules[config.name]()
    return after(_clip(config.clip), rule) if config.clip else rule


def _clip(most: float) -> optax.GradientTransformation:
    """Scale gradients down to a global norm of ``most``, with the same bits in every layout.

    What XLA makes of a sum depends on what gives its terms, and so it is with the division of an
    array by a scalar: the squares are summed as dot products of whole vectors, which have one order
    of memory and are not fused, and the factor is computed first.
    """

    def square(g: jax.Array) -> jax.Array:
        flat = g.astype(jnp.promote_types(g.dtype, jnp.float32)).reshape(-1)
        return lax.dot(flat, flat, precision=lax.Precision.HIGHEST)

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        norm = jnp.sqrt(sum(map(square, jax.tree.leaves(updates)), jnp.float32(0)))
        factor = lax.optimization_barrier(most / jnp.maximum(norm, most))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
