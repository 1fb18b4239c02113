"""Find a learning rate: try all of them in one dispatch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from fnml.core import ConfigError, step_key
from fnml.transforms._layout import GradFn

PyTree = Any
_RATES = tuple(np.geomspace(1e-5, 1.0, 21).tolist())


class Rates(NamedTuple):
    """What a trial of learning rates found.

    Attributes:
      rates: float32 ``[N]``, the rates that were tried.
      losses: float32 ``[N, K]``, the loss of each step at each rate; infinite once it diverged.
      best: the rate whose last losses are the lowest.
    """

    rates: np.ndarray
    losses: np.ndarray
    best: float


def find_rate(
    grad_fn: GradFn,
    optimizer: Callable[[Any], optax.GradientTransformation],
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    *,
    rates: Sequence[float] = _RATES,
    **options: Any,
) -> Rates:
    """Train from the same parameters with each learning rate for a few steps, all at once.

    Law: row ``i`` holds the losses that training with ``optimizer(rates[i])`` on the same batches
    gives, up to rounding.

    Args:
      grad_fn: ``grad_fn(params, batch, key, **options) -> ((loss, metrics), grads)``.
      optimizer: makes an optimizer from a (traced) learning rate, such as ``optax.adam``.
      params: where every trial starts; memory for N copies is needed.
      batches: the batches of the K steps, stacked: leaves ``[K, B, ...]``.
      key: the trials' key; step ``k`` uses ``step_key(key, k)``.
      rates: the learning rates.
      options: passed on to ``grad_fn``, such as a model's state.

    Raises:
      ConfigError: there are no rates, or one is not positive; or every rate diverged.

    >>> import jax, jax.numpy as jnp
    >>> from fnml.core import Mean, Metrics
    >>> def loss_fn(params, batch, key):
    ...     error = Mean.of((batch - params) ** 2)
    ...     return error.value, Metrics(error.weight)
    >>> grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    >>> batches = jnp.ones((5, 2))
    >>> found = find_rate(
    ...     grad_fn, optax.sgd, jnp.float32(0), batches, jax.random.key(0), rates=(0.01, 0.5, 2.0)
    ... )
    >>> round(found.best, 6)
    0.5
    """
    if not rates or not all(rate > 0 for rate in rates):
        raise ConfigError(f"find_rate tries positive learning rates, got {tuple(rates)}")

    def trial(rate: jax.Array) -> jax.Array:
        tx = optimizer(rate)

        def step(carry: PyTree, inputs: tuple[jax.Array, PyTree]) -> tuple[PyTree, jax.Array]:
            params, opt_state = carry
            k, batch = inputs
            (loss, _), grads = grad_fn(params, batch, step_key(key, k), **options)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss.astype(jnp.float32)

        count = len(jax.tree.leaves(batches)[0])
        steps = jnp.arange(count, dtype=jnp.int32)
        return lax.scan(step, (params, tx.init(params)), (steps, batches))[1]

    tried = jnp.asarray(rates, jnp.float32)
    losses = np.array(jax.jit(jax.vmap(trial))(tried))
    # What was NaN or infinite once has diverged, whatever it says later.
    diverged = np.logical_or.accumulate(~np.isfinite(losses), axis=1)
    losses = np.where(diverged, np.inf, losses)
    last = losses[:, -max(losses.shape[1] // 4, 1) :].mean(axis=1)
    if not np.isfinite(last).any():
        raise ConfigError(
            f"training diverged at every rate from {min(rates):g} to {max(rates):g}: try lower ones"
        )
    return Rates(np.asarray(tried), losses, float(rates[int(last.argmin())]))
