"""Every rate's losses are those of training with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fnml.core import ConfigError, Mean, Metrics, step_key
from fnml.transforms import find_rate

RNG = np.random.default_rng(3)
BATCHES = jnp.asarray(RNG.normal(size=(6, 16, 3)), jnp.float32)
PARAMS = jnp.zeros(3, jnp.float32)
KEY = jax.random.key(1)


def loss_fn(params, batch, key, *, shift=0.0):
    noise = 0.01 * jax.random.normal(key, (3,))
    error = Mean.of(jnp.sum((batch - (params + noise)[None] + 1.0 + shift) ** 2, axis=1))
    return error.value, Metrics(error.weight)


GRAD = jax.value_and_grad(loss_fn, has_aux=True)


# Optax's Adam raises a float to the power of its integer step count.
@jax.numpy_dtype_promotion("standard")
def test_the_losses_are_those_of_training_by_hand() -> None:
    rates = (0.003, 0.1, 0.4)
    found = find_rate(GRAD, optax.adam, PARAMS, BATCHES, KEY, rates=rates, shift=0.5)
    assert found.losses.shape == (3, 6)
    for rate, losses in zip(rates, found.losses, strict=True):
        tx = optax.adam(rate)
        params, opt_state = PARAMS, tx.init(PARAMS)
        for k, batch in enumerate(BATCHES):
            (loss, _), grads = GRAD(params, batch, step_key(KEY, k), shift=0.5)
            # Six steps of three numbers: batched over rates, each rounds on its own.
            assert losses[k] == pytest.approx(float(loss), rel=1e-5)
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)


def test_the_best_rate_is_neither_too_small_nor_divergent() -> None:
    rates = (1e-4, 0.3, 1e20)
    found = find_rate(GRAD, optax.sgd, PARAMS, BATCHES, KEY, rates=rates)
    assert found.best == 0.3
    assert np.isinf(found.losses[2, -1])
    assert np.isfinite(found.losses[:2]).all()


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match="positive learning rates"):
        find_rate(GRAD, optax.sgd, PARAMS, BATCHES, KEY, rates=(0.1, 0.0))
    with pytest.raises(ConfigError, match="diverged at every rate"):
        find_rate(GRAD, optax.sgd, PARAMS, BATCHES, KEY, rates=(1e25, 1e30))
