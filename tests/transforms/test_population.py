"""Members of a population train as they would alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fnml.core import ConfigError, Metrics, State, init
from fnml.models import MLPConfig, mlp
from fnml.train import cross_entropy, train_step
from fnml.transforms import fuse, population

MODEL = mlp(MLPConfig(inputs=6, hidden=(8,), outputs=3))
RNG = np.random.default_rng(2)
BATCHES = {
    "x": RNG.normal(size=(4, 5, 6)).astype(np.float32),
    "y": RNG.integers(0, 3, (4, 5)).astype(np.int32),
}


def loss_fn(params, batch, key):
    loss = cross_entropy(MODEL.apply(params, batch["x"]), batch["y"])
    return loss.value, Metrics(loss.weight)


def make(rate):
    return optax.inject_hyperparams(optax.adam)(learning_rate=rate)


STEP = train_step(jax.value_and_grad(loss_fn, has_aux=True), make(0.1))
RATES = jnp.array([0.1, 0.01, 0.001], jnp.float32)


def create(key, rate):
    return State.create(init(MODEL.spec, key), make(rate), key)


MEMBERS = jax.vmap(create)(jax.random.split(jax.random.key(0), 3), RATES)


def batch(k):
    return jax.tree.map(lambda x: x[k], BATCHES)


def raw(tree):
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in jax.tree.leaves(tree)
    ]


@pytest.mark.parametrize("mode", ["map", "vmap"])
def test_each_member_equals_a_run_alone(mode: str) -> None:
    run, alone = jax.jit(population(STEP, mode=mode)), jax.jit(STEP)
    states = MEMBERS
    singles = [jax.tree.map(lambda x, i=i: x[i], MEMBERS) for i in range(3)]
    for k in range(4):
        states, metrics = run(states, batch(k))
        for i in range(3):
            singles[i], single = alone(singles[i], batch(k))
            # Losses of one step: float32 rounding of a few products, grown over four steps.
            assert metrics["loss"].value[i] == pytest.approx(float(single["loss"].value), rel=1e-5)
    assert metrics["loss"].total.shape == (3,)
    if mode == "map":
        for i in range(3):
            member = jax.tree.map(lambda x, i=i: x[i], states)
            assert all(map(np.array_equal, raw(member), raw(singles[i])))


def test_members_differ_in_what_their_states_hold() -> None:
    states, _ = jax.jit(population(STEP))(MEMBERS, batch(0))
    moved = jax.vmap(lambda a, b: optax.tree.norm(jax.tree.map(jnp.subtract, a, b)))(
        states.params, MEMBERS.params
    )
    # Adam's first step has the length rate * sqrt(N), whatever the gradient.
    np.testing.assert_allclose(moved / moved[0], RATES / RATES[0], rtol=1e-3)


def test_each_member_can_have_its_own_batch_and_steps_can_be_fused() -> None:
    own = jax.tree.map(lambda x: x[:3], BATCHES)
    states, _ = jax.jit(population(STEP, mode="map", stacked=True))(MEMBERS, own)
    for i in range(3):
        single, _ = jax.jit(STEP)(jax.tree.map(lambda x, i=i: x[i], MEMBERS), batch(i))
        assert all(map(np.array_equal, raw(jax.tree.map(lambda x, i=i: x[i], states)), raw(single)))
    fused, _ = jax.jit(fuse(population(STEP, mode="map"), 4))(MEMBERS, BATCHES)
    stepped = MEMBERS
    for k in range(4):
        stepped, _ = jax.jit(population(STEP, mode="map"))(stepped, batch(k))
    assert all(map(np.array_equal, raw(fused), raw(stepped)))


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'vmap'"):
        population(STEP, mode="vmp")
