"""Optimizers from configuration, step by step against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fnml.core import ConfigError
from fnml.train import OptimizerConfig, optimizer

STEPS = 9


def rate(config, step):
    """Return the learning rate of a step, from the documentation."""
    warmup = min(config.warmup, STEPS - 1)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / (STEPS - warmup)
    last = config.final_fraction
    fall = {
        "constant": 1.0,
        "linear": 1 + (last - 1) * done,
        "cosine": last + (1 - last) * 0.5 * (1 + np.cos(np.pi * done)),
    }
    return config.learning_rate * fall[config.schedule]


def by_hand(config, params, gradients, decays):
    first = {name: np.zeros_like(p) for name, p in params.items()}
    second = {name: np.zeros_like(p) for name, p in params.items()}
    history = []
    for i, grads in enumerate(gradients):
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        scale = min(1.0, config.clip / norm) if config.clip else 1.0
        params = dict(params)
        for name in params:
            g = grads[name] * scale
            if config.name == "sgd":
                first[name] = config.b1 * first[name] + g
                move = first[name]
            else:
                first[name] = config.b1 * first[name] + (1 - config.b1) * g
                second[name] = config.b2 * second[name] + (1 - config.b2) * g**2
                mean = first[name] / (1 - config.b1 ** (i + 1))
                square = second[name] / (1 - config.b2 ** (i + 1))
                move = mean / (np.sqrt(square) + 1e-8)
                if config.name == "adamw" and name in decays:
                    move = move + config.weight_decay * params[name]
            params[name] = params[name] - rate(config, i) * move
        history.append(params)
    return history


def compare(config, decays=("kernel", "other")):
    rng = np.random.default_rng(0)
    params = {
        "kernel": rng.normal(size=(3, 2)),
        "other": rng.normal(size=(2, 2)),
        "bias": rng.normal(size=2),
    }
    gradients = [
        {name: rng.normal(size=p.shape) for name, p in params.items()} for _ in range(STEPS)
    ]
    expected = by_hand(config, params, gradients, decays)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        tx = optimizer(config, STEPS)
        found = jax.tree.map(jnp.asarray, params)
        opt_state = tx.init(found)
        update = jax.jit(tx.update)
        for grads, exact in zip(gradients, expected, strict=True):
            updates, opt_state = update(grads, opt_state, found)
            found = optax.apply_updates(found, updates)
            for name, value in exact.items():
                assert found[name].dtype == jnp.float64
                np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig("sgd", 0.1, "constant", warmup=0),
        OptimizerConfig("sgd", 0.1, "linear", warmup=3, b1=0.0, clip=0.7, final_fraction=0.2),
        OptimizerConfig("adam", 0.01, "linear", warmup=0),
        OptimizerConfig("adam", 0.01, "cosine", warmup=4, b1=0.8, b2=0.99, clip=1.0),
        OptimizerConfig("adamw", 0.01, "cosine", warmup=2, final_fraction=0.1, weight_decay=0.3),
        OptimizerConfig("adamw", 0.01, "constant", warmup=100, weight_decay=0.3),
    ],
    ids=lambda c: f"{c.name}-{c.schedule}-{c.warmup}",
)
def test_every_step_follows_the_formula(config):
    compare(config)


def test_decay_follows_the_globs():
    compare(
        OptimizerConfig("adamw", 0.01, warmup=0, weight_decay=0.5, decay=("ker*", "bias")),
        decays=("kernel", "bias"),
    )


def test_a_glob_that_matches_nothing_is_refused():
    tx = optimizer(OptimizerConfig(weight_decay=0.1, decay=("**/kernal",)), 10)
    with pytest.raises(ConfigError, match="kernal"):
        tx.init({"layer": {"kernel": jnp.ones((2, 2))}})


def test_the_first_step_learns_and_the_warmup_is_cut_to_the_run():
    tx = optimizer(OptimizerConfig("sgd", 1.0, warmup=10, b1=0.0), steps=1)
    params = {"w": jnp.ones(1)}
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update({"w": jnp.ones(1)}, tx.init(params), params)
    assert float(updates["w"][0]) == -1.0


def test_every_value_out_of_range_is_listed():
    with pytest.raises(ConfigError) as error:
        OptimizerConfig(
            name="adamv",  # type: ignore[arg-type]
            schedule="cosin",  # type: ignore[arg-type]
            learning_rate=0.0,
            warmup=-1,
            final_fraction=1.5,
            weight_decay=-0.1,
            b1=1.0,
            b2=-0.5,
            clip=-1.0,
        )
    message = str(error.value)
    for part in (
        "name='adamv': expected adamw or adam or sgd. Did you mean 'adam",
        "schedule='cosin'",
        "learning_rate=0.0",
        "warmup=-1",
        "final_fraction=1.5",
        "weight_decay=-0.1",
        "b1=1.0",
        "b2=-0.5",
        "clip=-1.0",
    ):
        assert part in message, part
    with pytest.raises(ConfigError, match="learning_rate=nan"):
        OptimizerConfig(learning_rate=float("nan"))
