"""sparsify and its schedule: zeros that grow as the schedule says, and never come back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapted_models import KEY, case, same_bits

from fnml.core import ConfigError, State
from fnml.train import train_step
from fnml.transforms import (
    adapt,
    cubic_sparsity,
    fuse,
    lora,
    sparsify,
    train_only,
    trainable_value_and_grad,
)


def test_the_schedule_is_the_papers():
    schedule = cubic_sparsity(0.9, 50, begin=10, initial=0.2)
    for step in (0, 10, 11, 35, 59, 60, 99):
        done = min(max((step - 10) / 50, 0), 1)
        expected = 0.9 + (0.2 - 0.9) * (1 - done) ** 3
        assert abs(float(schedule(step)) - expected) < 1e-6
        same_bits(jax.jit(schedule)(jnp.int32(step)), schedule(jnp.int32(step)))
    for bad in ({"final": 1.0, "steps": 5}, {"final": 0.1, "steps": 0, "initial": 0.5}):
        with pytest.raises(ConfigError, match="cubic_sparsity"):
            cubic_sparsity(**bad)


@pytest.mark.parametrize("scope", ["each", "global"])
def test_zeros_follow_the_schedule_and_stay(scope):
    c = case("mlp")
    schedule = cubic_sparsity(0.8, 8)
    optimizer = sparsify(optax.adamw(1e-2, weight_decay=0.1), schedule, every=2, scope=scope)
    step = train_step(jax.value_and_grad(c.loss_fn(c.model), has_aux=True), optimizer)
    state, run = State.create(c.params, optimizer, KEY), jax.jit(step)
    before: list[np.ndarray] = []
    for t in range(12):
        state, _ = run(state, c.batch)
        arrays = [np.asarray(x) for x in jax.tree.leaves(state.params) if x.ndim > 1]
        for old, new in zip(before, arrays, strict=False):
            assert np.all(new[old == 0] == 0)
        before = arrays
        share = float(schedule(t - t % 2))
        groups = [np.concatenate([x.ravel() for x in arrays])] if scope == "global" else arrays
        for x in groups:
            assert abs(np.sum(x == 0) - x.size * share) <= 1
    state, _ = State.create(c.params, optimizer, KEY), None
    batches = jax.tree.map(lambda x: jnp.stack([x] * 12), c.batch)
    fused, _ = jax.jit(fuse(step, 12))(state, batches)
    same_bits([x for x in jax.tree.leaves(fused.params) if x.ndim > 1], before)


def test_before_anything_is_pruned_it_is_the_inner_optimizer():
    c = case("mlp")
    inner = optax.sgd(1e-2, momentum=0.9)
    outer = sparsify(inner, lambda step: jnp.float32(0.0))
    grads = jax.tree.map(jnp.cos, c.params)
    ours, state = outer.update(grads, outer.init(c.params), c.params)
    same_bits(ours, inner.update(grads, inner.init(c.params), c.params)[0])
    assert int(state.steps) == 1 and all(bool(jnp.all(m)) for m in state.masks.values())


def test_a_schedule_that_falls_revives_nothing():
    params = {"w": jnp.arange(1.0, 9.0).reshape(2, 4)}
    optimizer = sparsify(
        optax.sgd(0.1), lambda step: jnp.where(step < 1, 0.5, 0.25).astype(jnp.float32), every=1
    )
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update({"w": -jnp.ones((2, 4))}, state, params)
        params = optax.apply_updates(params, updates)
        assert int(jnp.sum(state.masks["w"])) == 4 and not jnp.any(params["w"][0])


def test_it_goes_inside_train_only():
    c = case("mlp")
    model = lora(c.model, rank=2)
    optimizer = train_only(sparsify(optax.sgd(0.1), lambda step: jnp.float32(0.5), every=1), model)
    state = State.create(adapt(model, c.params, KEY), optimizer, KEY)
    step = train_step(trainable_value_and_grad(c.loss_fn(model), model), optimizer)
    state, _ = jax.jit(step)(state, c.batch)
    a = state.params["lora"]["head/kernel"]["a"]
    assert int(jnp.sum(a == 0)) == a.size // 2
    same_bits(state.params["base"], c.params)


def test_mistakes_are_named():
    params = {"w": jnp.ones((2, 2)), "n": jnp.ones((2, 2), jnp.int8)}
    schedule = cubic_sparsity(0.5, 10)
    with pytest.raises(ConfigError, match="every=0"):
        sparsify(optax.sgd(0.1), schedule, every=0)
    with pytest.raises(ConfigError, match="n: int8"):
        sparsify(optax.sgd(0.1), schedule, targets="*").init(params)
    with pytest.raises(ConfigError, match="no parameter at all"):
        sparsify(optax.sgd(0.1), schedule).init({"b": jnp.ones(2)})
    optimizer = sparsify(optax.sgd(0.1), schedule, targets="w")
    with pytest.raises(ConfigError, match=r"update\(grads, state, params\)"):
        optimizer.update(params, optimizer.init(params))
