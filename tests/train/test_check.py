"""check_step refuses what cannot run, before anything is compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fnml.core import ConfigError, Mean, ShapeError, State
from fnml.train import check_step

STATE = State.create({"w": jnp.zeros(3), "b": jnp.zeros(())}, optax.sgd(0.1), jax.random.key(0))
BATCH = {"x": np.zeros((4, 3), np.float32)}
LOSS = {"loss": Mean(jnp.float32(1), jnp.float32(1))}


def with_params(**params):
    return dataclasses.replace(STATE, params=params)


def test_a_good_step_gives_the_shapes_of_its_metrics_without_running():
    ran = []

    def step(state, batch):
        loss = Mean.of(batch["x"] @ state.params["w"])
        jax.debug.callback(lambda: ran.append(1))
        return state, {"loss": loss}

    metrics = check_step(step, STATE, BATCH)
    assert list(metrics) == ["loss"] and metrics["loss"].total.dtype == jnp.float32
    jax.effects_barrier()
    assert not ran


@pytest.mark.parametrize(
    ("step", "parts"),
    [
        (lambda s, b: (s, LOSS, b["x"] @ jnp.zeros(4)), ["x: float32[4, 3]", "TypeError"]),
        (lambda s, b: (s, LOSS, b["y"]), ["x: float32[4, 3]", "KeyError: 'y'"]),
        (lambda s, b: (s, LOSS, b.x), ["AttributeError"]),
        (lambda s, b: (s, LOSS, b["x"][0, 7, 1]), ["IndexError"]),
        (lambda s, b: (s, LOSS, b["x"] + jnp.zeros(4)), ["ValueError"]),
        (lambda s, b: s, ["returns (state, metrics), got State"]),
        (lambda s, b: (s, LOSS, 1), ["returns (state, metrics), got tuple"]),
        (
            lambda s, b: (with_params(w=jnp.zeros(4), c=jnp.zeros(())), LOSS),
            [
                "params/b: float32[] before, absent after",
                "params/c: absent before, float32[] after",
                "params/w: float32[3] before, float32[4] after",
            ],
        ),
        (
            lambda s, b: (with_params(w=jnp.zeros(3, jnp.bfloat16), b=jnp.zeros(())), LOSS),
            ["params/w: float32[3] before, bfloat16[3] after"],
        ),
        (
            lambda s, b: (dataclasses.replace(s, model_state=[]), LOSS),
            ["before", "after", "PyTreeDef"],
        ),
        (lambda s, b: (s, jnp.zeros(2)), ["dict of fnml.Mean", "got ShapeDtypeStruct"]),
        (lambda s, b: (s, {"accuracy": LOSS["loss"]}), ["'loss' among them", "accuracy"]),
        (lambda s, b: (s, {**LOSS, "rate": jnp.zeros(())}), ["'rate': 'ShapeDtypeStruct'"]),
        (
            lambda s, b: (s, {**LOSS, "each": Mean(jnp.zeros(4), jnp.ones(4))}),
            ["metrics are scalars", "'each': (4,)"],
        ),
    ],
)
def test_every_fault_is_named(step, parts):
    with pytest.raises(ShapeError) as error:
        check_step(step, STATE, BATCH)
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_errors_of_our_own_pass_unchanged_and_others_are_chained():
    def refuse(state, batch):
        raise ConfigError("mine")

    with pytest.raises(ConfigError, match="mine"):
        check_step(refuse, STATE, BATCH)

    def bug(state, batch):
        return {}["missing"]

    with pytest.raises(ShapeError) as error:
        check_step(bug, STATE, BATCH)
    assert isinstance(error.value.__cause__, KeyError)
