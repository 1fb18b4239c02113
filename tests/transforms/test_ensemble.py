"""ensemble: each member is the model alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapted_models import KEY, case, distance, same_bits

from fnml.core import ConfigError, State, count, fold_name, init
from fnml.train import train_step
from fnml.transforms import (
    accumulate,
    adapt,
    ensemble,
    lora,
    quantize,
    train_only,
    trainable_value_and_grad,
)

N = 3


def member(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("mlp", "map"),
        ("mlp", "vmap"),
        ("cnn", "vmap"),
        ("gpt", "map"),
        ("linen", "map"),
        ("nnx", "vmap"),
    ],
)
def test_each_member_is_the_model_alone(name, mode):
    c = case(name)
    model = ensemble(c.model, N, outputs="all", mode=mode)
    state, params = init(model.state, KEY), init(model.spec, KEY)
    out = c.call(model, params, KEY, **({"state": state} if c.state else {}))
    alone = [
        c.call(
            c.model,
            member(params, i),
            jax.random.fold_in(KEY, i),
            **({"state": member(state, i)} if c.state else {}),
        )
        for i in range(N)
    ]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *alone)
    # flax's convolution has other bits inside a loop, as the guests' page says.
    if mode == "map" and name != "linen":
        same_bits(out, stacked)
    assert distance(out, stacked) < 5e-6
    if name in ("mlp", "cnn"):
        own = {"state": state} if c.state else {}
        mean = c.call(ensemble(c.model, N, mode=mode), params, KEY, **own)
        logits = mean[0] if c.state else mean
        assert distance(logits, jnp.mean(stacked[0] if c.state else stacked, 0)) < 5e-6
        if c.state:
            assert distance(mean[1], stacked[1]) < 5e-6
    assert distance(member(params, 0), member(params, 1)) > 0.1


def test_members_draw_by_their_own_keys():
    c = case("gpt")
    model = ensemble(c.model, N)
    params = init(model.spec, KEY)
    key = fold_name(KEY, "layers/mlp/up")
    up = c.model.spec["layers"]["mlp"]["up"]
    for i in range(N):
        expected = up.init(jax.random.fold_in(key, i), up.shape, up.dtype)
        np.testing.assert_allclose(params["layers"]["mlp"]["up"][i], expected, rtol=1e-6)
    assert model.spec["layers"]["mlp"]["up"].axes == ("members", "layers", "embed", "mlp")
    assert count(model.spec) == N * count(c.model.spec)


def test_loras_over_one_quantised_base():
    c = case("gpt")
    one = lora(quantize(c.model), rank=2)
    model = ensemble(one, N, shared="base/**")
    assert count(model.spec["base"]) == count(one.spec["base"])
    assert count(model.spec["lora"]) == N * count(one.spec["lora"])
    base = adapt(quantize(c.model), c.params)
    params = {**init(model.spec, KEY), "base": base}
    optimizer = train_only(optax.adam(1e-2), model)
    grad_fn = accumulate(trainable_value_and_grad(c.loss_fn(model), model), 2)
    step = jax.jit(train_step(grad_fn, optimizer))
    state = State.create(params, optimizer, KEY)
    assert (
        sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * count(model.spec["lora"]) + 1
    )
    for _ in range(2):
        state, _ = step(state, c.batch)
    same_bits(state.params["base"], base)
    each = [c.call(one, {"base": base, "lora": member(state.params["lora"], i)}) for i in range(N)]
    assert distance(c.call(model, state.params), sum(each) / N) < 5e-6
    assert distance(each[0], each[1]) > 1e-6


def test_factors_of_an_ensemble_are_each_members_own():
    c = case("mlp")
    tuned = lora(ensemble(c.model, N), rank=2)
    assert tuned.spec["lora"]["head/kernel"]["a"].shape == (N, 16, 2)
    params = adapt(tuned, init(ensemble(c.model, N).spec, KEY), KEY)
    same_bits(c.call(tuned, params), c.call(ensemble(c.model, N), params["base"]))


def test_mistakes_are_named():
    m = case("mlp").model
    with pytest.raises(ConfigError, match=r"members=0.*outputs='men'.*'mean'.*mode='vmaps'"):
        ensemble(m, 0, outputs="men", mode="vmaps")
    with pytest.raises(ConfigError, match="matches none"):
        ensemble(m, 2, shared="nowhere")
