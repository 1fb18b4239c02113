"""Derivatives through training against finite differences in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fnml.transforms import hypergradient

STEPS, B = 5, 8


def problem(dtype):
    rng = np.random.default_rng(4)
    batches = {
        "x": jnp.asarray(rng.normal(size=(STEPS, B, 3)), dtype),
        "i": jnp.asarray(rng.permutation(STEPS * B).reshape(STEPS, B)),
    }
    held_out = jnp.asarray(rng.normal(size=(B, 3)), dtype)
    truth = jnp.asarray([1.0, -2.0, 0.5], dtype)
    tx = optax.sgd(1.0, momentum=0.5)

    def inner(params, batch, hyper):
        error = (jnp.tanh(batch["x"] @ params) - jnp.tanh(batch["x"] @ truth)) ** 2
        weights = jax.nn.softmax(hyper["weights"])[batch["i"]]
        return jnp.sum(weights * error) + hyper["decay"] * jnp.sum(params**2)

    def update(hyper, carry, batch, key):
        params, state = carry
        updates, state = tx.update(jax.grad(inner)(params, batch, hyper), state, params)
        return jax.tree.map(lambda p, u: p + hyper["rate"] * u, params, updates), state

    def outer(carry):
        return jnp.mean((jnp.tanh(held_out @ carry[0]) - jnp.tanh(held_out @ truth)) ** 2)

    hyper = {
        "rate": jnp.asarray(2.0, dtype),
        "decay": jnp.asarray(0.05, dtype),
        "weights": jnp.asarray(rng.normal(size=STEPS * B), dtype),
    }
    params = jnp.asarray([0.1, 0.2, -0.1], dtype)
    return update, outer, hyper, (params, tx.init(params)), batches


def test_rate_decay_and_data_weights_against_finite_differences() -> None:
    with jax.enable_x64(True):
        update, outer, hyper, carry, batches = problem(jnp.float64)
        run = jax.jit(hypergradient(update, outer))
        key = jax.random.key(0)
        loss, grads = run(hyper, carry, batches, key)
        flat, unravel = jax.flatten_util.ravel_pytree(hyper)
        slopes, _ = jax.flatten_util.ravel_pytree(grads)
        rng, eps = np.random.default_rng(5), 1e-6
        for _ in range(4):
            direction = jnp.asarray(rng.normal(size=flat.shape))
            above = run(unravel(flat + eps * direction), carry, batches, key)[0]
            below = run(unravel(flat - eps * direction), carry, batches, key)[0]
            # Central differences: the error is of order eps^2 + 1e-16 / eps.
            assert float(slopes @ direction) == pytest.approx(
                float((above - below) / (2 * eps)), rel=1e-5
            )
        assert all(np.abs(g).max() > 1e-6 for g in jax.tree.leaves(grads)), "each one has an effect"
        assert np.isfinite(float(loss))


def test_it_equals_the_steps_written_out() -> None:
    update, outer, hyper, carry, batches = problem(jnp.float32)

    def written_out(hyper):
        state = carry
        for k in range(STEPS):
            state = update(hyper, state, jax.tree.map(lambda x, k=k: x[k], batches), None)
        return outer(state)

    loss, grads = hypergradient(update, outer)(hyper, carry, batches, jax.random.key(0))
    expected, slopes = jax.value_and_grad(written_out)(hyper)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for name in hyper:
        error = np.linalg.norm(grads[name] - slopes[name]) / np.linalg.norm(slopes[name])
        # Five steps of float32 rounding in both.
        assert error < 1e-4, name


def test_memory_grows_with_what_is_carried_not_with_activations() -> None:
    def update(hyper, w, x, key):
        def inner(w):
            hidden = jnp.tanh(x[:, None] * w[None])
            for _ in range(6):
                hidden = jnp.sin(hidden) + hidden
            return jnp.mean(hidden)

        return w - hyper * jax.grad(inner)(w)

    def temporaries(run, steps):
        args = jnp.float32(0.1), jnp.ones(16), jnp.ones((steps, 2048)), jax.random.key(0)
        return jax.jit(run).lower(*args).compile().memory_analysis().temp_size_in_bytes

    run = hypergradient(update, jnp.sum)
    # One step's activations are 2048 x 16 floats several times over; a carry is 64 bytes.
    assert temporaries(run, 32) - temporaries(run, 4) < 2048 * 16 * 4
