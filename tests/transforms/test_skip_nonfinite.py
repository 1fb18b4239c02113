"""skip_nonfinite: the step itself where it is finite, nothing where it is not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fnml.core import ConfigError, Mean, Metrics, State
from fnml.train import train_step
from fnml.transforms import accumulate, fuse, skip_nonfinite

BAD = {1, 3, 4}


def loss_fn(params, batch, key, *, state):
    noise = jax.random.normal(key, batch.shape)
    h = jnp.tanh(batch * params["w"].reshape(1, -1) + 0.1 * noise)
    # The statistics go bad with the data, as BatchNorm's do.
    stats = {"mean": Mean(batch.sum(0), jnp.full(batch.shape[1], batch.shape[0], jnp.float32))}
    error = Mean.of((h - state["mean"].reshape(1, -1)) ** 2)
    return error.value, Metrics(error.weight, {"h": Mean.of(h)}, stats)


OPTIMIZER = optax.adamw(1e-2)
STEP = train_step(accumulate(jax.value_and_grad(loss_fn, has_aux=True), 2), OPTIMIZER)


def start() -> State:
    params = {"w": jnp.linspace(-1.0, 1.0, 3)}
    model_state = {"mean": jnp.zeros(3)}
    return State.create(params, OPTIMIZER, jax.random.key(0), model_state)


@functools.cache
def batches(bad: float | None = None) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(6, 4, 3)).astype(np.float32)
    if bad is not None:
        x[sorted(BAD), 2, 1] = bad
    return x


def raw(tree):
    def data(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return [np.asarray(data(x)).tobytes() for x in jax.tree.leaves(tree)]


def test_where_everything_is_finite_it_is_the_step_bit_for_bit():
    plain, guarded = jax.jit(STEP), jax.jit(skip_nonfinite(STEP))
    state = other = start()
    for batch in batches():
        state, metrics = plain(state, batch)
        other, found = guarded(other, batch)
        assert float(found.pop("skipped").total) == 0.0
        assert raw(found) == raw(metrics)
    assert raw(other) == raw(state)
    assert raw(state.params) != raw(start().params)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_step_changes_nothing_but_the_counter(bad):
    plain, guarded = jax.jit(STEP), jax.jit(skip_nonfinite(STEP))
    state = start()
    for i, batch in enumerate(batches(bad)):
        # By hand: the plain step where the batch is good, the counter alone where it is not.
        before, (expected, metrics) = state, plain(state, batch)
        state, found = guarded(state, batch)
        assert int(state.step) == i + 1
        if i in BAD:
            assert raw(state) == raw(dataclasses.replace(before, step=state.step))
            assert {name: (float(m.total), float(m.weight)) for name, m in found.items()} == {
                "loss": (0, 0),
                "h": (0, 0),
                "skipped": (1, 1),
            }
        else:
            assert raw(state) == raw(expected)
            assert raw({"loss": found["loss"], "h": found["h"]}) == raw(metrics)


def test_fused_it_skips_single_steps():
    guarded = skip_nonfinite(STEP)
    state, metrics = jax.jit(fuse(guarded, 6))(start(), batches(np.nan))
    expected, single = start(), jax.jit(guarded)
    for batch in batches(np.nan):
        expected, _ = single(expected, batch)
    assert raw(state) == raw(expected)
    assert metrics["skipped"].total.tolist() == [0, 1, 0, 1, 1, 0]
    assert metrics["loss"].weight.tolist() == [12 * (i not in BAD) for i in range(6)]


def test_a_finite_update_from_an_infinite_gradient_is_skipped_too():
    # The sign of an infinite gradient is 1, so the parameters stay finite: the momentum tells.
    lion = optax.lion(1e-2)
    step = train_step(jax.value_and_grad(loss_fn, has_aux=True), lion)

    def overflowing(state, batch):
        new, metrics = step(state, batch)
        inf = jax.tree.map(lambda m: jnp.full_like(m, jnp.inf), new.opt_state[0].mu)
        return dataclasses.replace(
            new, opt_state=(new.opt_state[0]._replace(mu=inf), *new.opt_state[1:])
        ), metrics

    state = State.create(start().params, lion, jax.random.key(0), start().model_state)
    new, metrics = jax.jit(skip_nonfinite(overflowing))(state, batches()[0])
    assert float(metrics["skipped"].value) == 1.0
    assert raw(new.params) == raw(state.params) and raw(new.opt_state) == raw(state.opt_state)


def test_an_infinity_that_was_there_before_does_not_count():
    best = jnp.float32(jnp.inf)  # as in optax.contrib.reduce_on_plateau

    def step(state, batch):
        params = jax.tree.map(lambda p: p + 1, state.params)
        return dataclasses.replace(state, params=params, step=state.step + 1), {}

    state = dataclasses.replace(start(), opt_state={"best": best})
    new, metrics = skip_nonfinite(step)(state, batches()[0])
    assert float(metrics["skipped"].value) == 0.0
    np.testing.assert_array_equal(new.params["w"], state.params["w"] + 1)


def test_a_metric_of_the_same_name_is_refused():
    with pytest.raises(ConfigError, match="metric 'skipped' already"):
        skip_nonfinite(skip_nonfinite(STEP))(start(), batches()[0])
