"""ema: the textbook average in float64, and a training that does not notice it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnml.core import ConfigError, Mean, Metrics, State
from fnml.train import train_step
from fnml.transforms import accumulate, ema, ema_params, fuse

# One rounding per update, of an average that later updates shrink: a few ulps of 1.2e-7.
ROUNDING = 1e-6


def textbook(start, steps, decay, debias):
    """Average float64 rows; without bias correction the start keeps its weight."""
    average = np.zeros_like(start) if debias else start.copy()
    for p in steps:
        average = decay * average + (1 - decay) * p
    return average / (1 - decay ** len(steps)) if debias else average


@settings(max_examples=25)
@given(
    decay=st.sampled_from([0.1, 0.9, 0.999, 0.99999]),
    count=st.integers(1, 40),
    debias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_it_is_the_textbook_average_in_float64(decay, count, debias, seed):
    rng = np.random.default_rng(seed)
    start = rng.normal(size=3).astype(np.float32)
    optimizer = ema(optax.sgd(1.0), decay, debias=debias)
    state, params, seen = optimizer.init(jnp.asarray(start)), jnp.asarray(start), []
    for grads in rng.normal(size=(count, 3)).astype(np.float32):
        updates, state = optimizer.update(jnp.asarray(grads), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(params, float))
    expected = textbook(start.astype(float), seen, decay, debias)
    error = np.linalg.norm(np.asarray(state.average, float) - expected)
    assert error < ROUNDING * np.linalg.norm([np.linalg.norm(p) for p in seen])


def test_parameters_that_stand_still_are_their_own_average():
    p = jnp.asarray(np.random.default_rng(0).normal(size=50), jnp.float32)
    optimizer = ema(optax.sgd(1.0), 0.9999)
    # It starts elsewhere, where a bias-corrected average must not remember to have been.
    state = optimizer.init(jnp.zeros(50))
    for _ in range(3):
        _, state = optimizer.update(jnp.zeros(50), state, p)
    np.testing.assert_array_equal(state.average, p)


def loss_fn(params, batch, key):
    error = Mean.of((batch @ params["w"] - params["b"] + jax.random.normal(key)) ** 2)
    return error.value, Metrics(error.weight)


GRAD = accumulate(jax.value_and_grad(loss_fn, has_aux=True), 2)
PARAMS = {"w": jnp.linspace(-1.0, 1.0, 3), "b": jnp.float32(0.5)}
BATCHES = np.random.default_rng(1).normal(size=(4, 8, 3)).astype(np.float32)


def run(optimizer, *, fused=False):
    step = train_step(GRAD, optimizer)
    state = State.create(PARAMS, optimizer, jax.random.key(0))
    if fused:
        return jax.jit(fuse(step, 4))(state, BATCHES)[0]
    step = jax.jit(step)
    for batch in BATCHES:
        state, _ = step(state, batch)
    return state


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_training_has_the_bits_of_the_inner_optimizer():
    inner = optax.adamw(1e-2)
    plain, averaged = run(inner), run(ema(inner, 0.9))
    same(averaged.params, plain.params)
    same(averaged.opt_state.inner, plain.opt_state)
    assert np.linalg.norm(np.subtract(ema_params(averaged)["w"], plain.params["w"])) > 1e-4


def test_inside_fuse_and_chain_it_has_the_bits_of_single_steps():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), ema(optax.sgd(0.1, 0.9), 0.9))
    fused, single = run(optimizer, fused=True), run(optimizer)
    same(fused.opt_state, single.opt_state)
    same(ema_params(fused), single.opt_state[1].average)


def test_narrow_parameters_are_averaged_in_float32():
    optimizer = ema(optax.sgd(1.0), 0.999, debias=False)
    params = jnp.ones(4, jnp.bfloat16)
    state = optimizer.init(params)
    for _ in range(8):
        _, state = optimizer.update(jnp.zeros(4, jnp.bfloat16), state, params + 1)
    assert state.average.dtype == jnp.float32
    # In bfloat16 a step of 0.001 from 1 would be rounded away.
    np.testing.assert_allclose(state.average, 2 - 0.999**8, rtol=1e-6)
    created = State.create(params, optimizer, jax.random.key(0))
    assert ema_params(created).dtype == jnp.bfloat16


def test_extra_arguments_reach_the_inner_optimizer():
    def update(grads, state, params=None, *, rate):
        return jax.tree.map(lambda g: -rate * g, grads), state

    scaled = optax.GradientTransformationExtraArgs(lambda params: (), update)
    optimizer = ema(scaled, 0.5)
    updates, _ = optimizer.update(
        jnp.float32(2.0), optimizer.init(jnp.float32(0.0)), jnp.float32(0.0), rate=3.0
    )
    assert float(updates) == -6.0


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 1.5])
def test_a_decay_out_of_range_is_named(decay):
    with pytest.raises(ConfigError, match=rf"share in \(0, 1\), got {decay}"):
        ema(optax.sgd(1.0), decay)


def test_an_optimizer_is_averaged_once():
    for inner in (ema(optax.sgd(1.0), 0.5), optax.chain(optax.clip(1.0), ema(optax.sgd(1.0), 0.5))):
        with pytest.raises(ConfigError, match=r"averages the parameters already.*apply ema once"):
            ema(inner, 0.9).init(PARAMS)


def test_missing_parameters_and_missing_or_double_averages_are_named():
    optimizer = ema(optax.sgd(1.0), 0.9)
    with pytest.raises(ConfigError, match=r"update\(grads, state, params\)"):
        optimizer.update(jnp.ones(1), optimizer.init(jnp.ones(1)))
    plain = State.create(PARAMS, optax.sgd(1.0), jax.random.key(0))
    with pytest.raises(ConfigError, match="holds 0 averages"):
        ema_params(plain)
    state = optimizer.init(PARAMS)
    with pytest.raises(ConfigError, match="holds 2 averages"):
        ema_params(dataclasses.replace(plain, opt_state=(state, state)))
