"""freeze: what does not train costs no gradient, no optimizer state, and keeps its bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapted_models import KEY, case, same_bits

from fnml.core import ConfigError, LayoutError, Model, Param, ShapeError, State, init
from fnml.train import fit, train_step
from fnml.transforms import (
    accumulate,
    cast,
    data_parallel,
    ema,
    freeze,
    loss_scaling,
    scaled_value_and_grad,
    train_only,
    trainable,
    trainable_value_and_grad,
    with_loss_scale,
)

FROZEN = {
    "cnn": ("stem/**", "stages/**"),
    "gpt": ("embed/**", "layers/**"),
    "nnx": "hidden/*",
}


def pick(model, tree, wanted):
    """Return the leaves of ``tree`` that train, or those that don't."""
    hits = jax.tree.leaves(trainable(model))
    return [x for hit, x in zip(hits, jax.tree.leaves(tree), strict=True) if hit is wanted]


@pytest.mark.parametrize("name", ["cnn", "gpt", "nnx"])
def test_frozen_bits_stay_and_only_what_trains_has_state(name):
    c = case(name)
    model = freeze(c.model, FROZEN[name])
    same_bits(c.call(model, c.params, KEY), c.call(c.model, c.params, KEY))
    # A negative zero would turn into a positive one if 0 were added to it.
    params = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(-0.0), c.params)
    optimizer = train_only(optax.adamw(1e-2, weight_decay=0.1), model)
    loss_fn = c.loss_fn(model)
    step = train_step(trainable_value_and_grad(loss_fn, model), optimizer)
    start = State.create(params, optimizer, KEY, c.state)
    trained = sum(x.size for x in pick(model, params, True))
    assert sum(x.size for x in jax.tree.leaves(start.opt_state)) == 2 * trained + 1
    state = start
    run = jax.jit(step)
    for _ in range(3):
        state, _ = run(state, c.batch)
    same_bits(pick(model, state.params, False), pick(model, params, False))
    for before, after in zip(
        pick(model, params, True), pick(model, state.params, True), strict=True
    ):
        assert jnp.any(before != after)
    if name == "gpt":  # the most costly to compile, and lora's tests differentiate it
        return
    # What trains does as if the rest were constants of the loss.
    grads = jax.jit(jax.grad(loss_fn, has_aux=True))(params, c.batch, KEY, **c.options)[0]
    found = jax.jit(trainable_value_and_grad(loss_fn, model))(params, c.batch, KEY, **c.options)[1]
    same_bits(pick(model, found, True), pick(model, grads, True))
    assert all(np.all(g == 0) for g in pick(model, grads, False))
    assert {g.shape for g in pick(model, found, False)} == {()}


def test_updates_are_the_inner_optimizers():
    c = case("mlp")
    model = freeze(c.model, "hidden/**")
    inner = optax.sgd(1e-2, momentum=0.9)
    outer = train_only(inner, model)
    grads = jax.tree.map(jnp.cos, c.params)
    updates, _ = outer.update(grads, outer.init(c.params), c.params)
    alone, _ = inner.update(grads["head"], inner.init(c.params["head"]), c.params["head"])
    same_bits(updates["head"], alone)
    # Whatever gradient there is for it, no bit of a frozen parameter moves: not even -0.
    frozen = jax.tree.map(lambda x: -jnp.zeros_like(x), c.params)
    same_bits(optax.apply_updates(frozen, updates)["hidden"], frozen["hidden"])


def test_no_memory_is_planned_for_frozen_gradients():
    wide = 512
    normal = jax.nn.initializers.normal()
    names = ("frozen", "trained")
    model = Model(
        {name: Param((wide, wide), ("embed", "mlp"), normal) for name in names},
        lambda params, x: jnp.tanh(x @ params["frozen"]) @ params["trained"],
    )
    model = freeze(model, "frozen")

    def loss_fn(params, batch, key):
        from fnml.core import Mean, Metrics

        error = Mean.of(model.apply(params, batch) ** 2)
        return error.value, Metrics(error.weight)

    params = init(model.spec, KEY)
    x = jnp.ones((4, wide))

    def outputs(grad_fn):
        return jax.jit(grad_fn).lower(params, x, KEY).compile().memory_analysis()

    ours = outputs(accumulate(trainable_value_and_grad(loss_fn, model), 4))
    plain = outputs(accumulate(jax.value_and_grad(loss_fn, has_aux=True), 4))
    matrix = 4 * wide * wide
    assert plain.output_size_in_bytes - ours.output_size_in_bytes > 0.99 * matrix
    # JAX knows that the plain sums of the frozen matrix are zero: they are made at the end.
    assert ours.temp_size_in_bytes <= plain.temp_size_in_bytes
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    both = [
        jax.jit(wrap(trainable_value_and_grad(loss_fn, model)))(params, x, KEY)
        for wrap in (lambda g: data_parallel(g, mesh), lambda g: accumulate(g, 2))
    ]
    same_bits(*both)


def test_it_goes_through_fit_and_other_optimizer_wrappers():
    c = case("mlp")
    model = cast(freeze(c.model, "hidden/**"), "float32")
    optimizer = train_only(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)), model)
    step = train_step(trainable_value_and_grad(c.loss_fn(model), model), optimizer, grad_norm=True)
    state = State.create(c.params, optimizer, KEY)
    done = fit(step, state, [c.batch] * 4, steps=4, fuse=2)
    looped, run = state, jax.jit(step)
    for _ in range(4):
        looped, _ = run(looped, c.batch)
    same_bits(done.state.params, looped.params)
    same_bits(done.state.params["hidden"], c.params["hidden"])
    # An average inside train_only is one of what trains.
    averaged = train_only(ema(optax.adam(1e-2), 0.9), model).init(c.params)
    assert averaged.average["hidden"] == [{"bias": None, "kernel": None}]


def test_it_differentiates_with_a_scaled_loss_too():
    c = case("mlp")
    model = freeze(c.model, "hidden/**")
    loss_fn = c.loss_fn(model)
    optimizer = train_only(optax.sgd(0.1), model)
    grad_fn = trainable_value_and_grad(loss_fn, model, differentiate=scaled_value_and_grad)
    step = loss_scaling(lambda g: train_step(g, optimizer), grad_fn)
    state = with_loss_scale(State.create(c.params, optimizer, KEY))
    scaled, _ = jax.jit(step)(state, c.batch)
    plain = train_step(trainable_value_and_grad(loss_fn, model), optimizer)
    expected, _ = jax.jit(plain)(State.create(c.params, optimizer, KEY), c.batch)
    np.testing.assert_allclose(
        scaled.params["head"]["kernel"], expected.params["head"]["kernel"], rtol=1e-6
    )
    same_bits(scaled.params["hidden"], c.params["hidden"])


def test_mistakes_are_named():
    c = case("mlp")
    loss_fn = c.loss_fn(c.model)
    with pytest.raises(ConfigError, match="all 4 parameters of the model are frozen"):
        trainable_value_and_grad(loss_fn, freeze(c.model))
    with pytest.raises(ConfigError, match="nothing trains"):
        train_only(optax.sgd(0.1), freeze(c.model))
    with pytest.raises(ConfigError, match="matches none"):
        freeze(c.model, "hiden/**")
    grad_fn = accumulate(jax.value_and_grad(loss_fn, has_aux=True), 2)
    with pytest.raises(LayoutError, match=r"accumulate\(trainable_value_and_grad"):
        trainable_value_and_grad(grad_fn, c.model)
    optimizer = train_only(optax.sgd(0.1), c.model)
    with pytest.raises(ShapeError, match="head/kernel: expected, but not there"):
        optimizer.init({"hidden": c.params["hidden"], "head": {"bias": jnp.ones(5)}})
    with pytest.raises(ConfigError, match=r"update\(grads, state, params\)"):
        optimizer.update(c.params, optimizer.init(c.params))
