"""The first state is drawn beside other work, and is the same."""

import threading

import jax
import numpy as np
import pytest

from fnml.core import State, fold_name, init
from fnml.recipes import RunConfig, _training, find_recipe
from fnml.recipes._training import drawing, initial_state, make_step
from fnml.train import check_step, optimizer


@pytest.fixture(scope="module")
def run():
    recipe = find_recipe("digits")
    config = recipe.config(network="mlp", run=RunConfig(seed=5, steps=3, batch_size=8))
    return recipe.build(config, None), config


def by_hand(task, config):
    def draw(seed):
        init_key, run_key = jax.random.split(jax.random.key(seed))
        params = init(task.model.spec, init_key)
        model_state = init(task.model.state, fold_name(init_key, "state"))
        return State.create(
            params, optimizer(config.optimizer, config.run.steps), run_key, model_state
        )

    return jax.jit(draw)(np.int64(config.run.seed))


def numbers(state):
    leaves, structure = jax.tree.flatten(state)
    keys = [jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    plain = [jax.random.key_data(x) if key else x for x, key in zip(leaves, keys, strict=True)]
    return structure, [(x.dtype, np.asarray(x).tobytes()) for x in plain]


def test_a_state_drawn_while_the_step_is_traced_has_the_bits_of_one_drawn_alone(run):
    task, config = run
    with drawing(task, config) as drawn:
        state = by_hand(task, config)
        check_step(make_step(task, config), state, task.train.at(0))
        beside = drawn()
    assert numbers(beside) == numbers(initial_state(task, config)) == numbers(state)


def test_it_is_traced_by_the_callers_settings(run):
    with jax.default_prng_impl("rbg"), drawing(*run) as drawn:
        assert str(jax.random.key_impl(drawn().key)) == "rbg"


def test_what_the_thread_raises_is_raised_where_the_state_is_asked_for(run, monkeypatch):
    threads = []

    def fail():
        threads.append(threading.current_thread())
        raise MemoryError("no room")

    monkeypatch.setattr(_training, "_draw", lambda task, config: fail)
    with drawing(*run) as drawn, pytest.raises(MemoryError, match="no room"):
        drawn()
    assert threads and threads[0] is not threading.current_thread()
