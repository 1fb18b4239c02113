"""lora: the base exactly at the start, and merged weights that compute the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapted_models import KEY, NAMES, case, distance, same_bits
from jax.sharding import AxisType

from fnml.core import ConfigError, Model, Param, ShapeError, State, count, init
from fnml.models import GPTConfig, gpt
from fnml.train import train_step
from fnml.transforms import (
    accumulate,
    adapt,
    data_parallel,
    fuse,
    lora,
    merge,
    mixed_precision,
    per_example,
    quantize,
    remat,
    train_only,
    trainable_value_and_grad,
)

# float32 products of a few hundred terms, through a few layers: some tens of ulps of 6e-8.
ROUNDING = 5e-6


def stirred(params, key=KEY):
    """Return the parameters with factors that are not 0."""
    leaves, tree = jax.tree.flatten(params["lora"])
    keys = jax.random.split(key, len(leaves))
    drawn = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return {**params, "lora": jax.tree.unflatten(tree, drawn)}


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_as_the_base_bit_for_bit_and_merges_to_rounding(name):
    c = case(name)
    model = lora(c.model, rank=2, alpha=3.0)
    params = adapt(model, c.params, KEY)
    same_bits(params["base"], c.params)
    plain = c.call(c.model, c.params, KEY)  # with the base's own random draws
    same_bits(c.call(model, params, KEY), plain)
    same_bits(merge(model, params), c.params)
    tuned = stirred(params)
    out = c.call(model, tuned, KEY)
    assert distance(out, c.call(c.model, merge(model, tuned), KEY)) < ROUNDING
    assert distance(out, plain) > 1e-2
    assert model.state == c.model.state


def test_the_weight_is_the_textbook_one_in_float64():
    c = case("gpt")
    model = lora(c.model, rank=2, alpha=3.0, targets="layers/attention/*")
    params = stirred(adapt(model, c.params, KEY))
    merged = merge(model, params)["layers"]["attention"]
    for name, w in c.params["layers"]["attention"].items():
        pair = params["lora"][f"layers/attention/{name}"]
        a, b = np.float64(pair["a"]), np.float64(pair["b"])
        for layer in range(2):
            expected = np.float64(w[layer]) + 1.5 * (a[layer] @ b[layer]).reshape(w[layer].shape)
            np.testing.assert_allclose(merged[name][layer], expected, atol=1e-6)
    same_bits(merge(model, params)["layers"]["mlp"], c.params["layers"]["mlp"])


def test_factors_follow_the_shapes_of_what_they_change():
    model = lora(gpt(GPTConfig(vocab=11, width=16, layers=3, heads=2)), rank=2)
    shapes = jax.tree.map(lambda p: p.shape, model.spec["lora"])
    assert shapes["layers/attention/query"] == {"a": (3, 16, 2), "b": (3, 2, 16)}
    assert shapes["layers/attention/out"] == {"a": (3, 16, 2), "b": (3, 2, 16)}
    assert shapes["layers/mlp/down"] == {"a": (3, 64, 2), "b": (3, 2, 16)}
    assert shapes["embed/table"] == {"a": (11, 2), "b": (2, 16)}
    assert "norm/scale" not in shapes and "layers/mlp_norm/scale" not in shapes
    assert model.spec["lora"]["layers/mlp/up"]["a"].axes == ("layers", "embed", None)
    assert model.spec["lora"]["layers/mlp/up"]["b"].axes == ("layers", None, "mlp")
    for shape, matrix in (
        ((3, 3, 8, 16), (72, 16)),
        ((3, 3, 2, 4), (9, 8)),  # smaller than 18 and 4
        ((16, 2, 8), (16, 16)),
        ((2, 8, 16), (16, 16)),
    ):
        conv = Model({"w": Param(shape, (None,) * len(shape), jnp.ones)}, lambda p: p["w"])
        pair = lora(conv, rank=2).spec["lora"]["w"]
        assert (pair["a"].shape, pair["b"].shape) == ((matrix[0], 2), (2, matrix[1]))


def test_a_negative_zero_stays_one_at_the_start():
    spec = {"w": Param((9, 9), (None, None), jax.nn.initializers.zeros)}
    model = lora(Model(spec, lambda params: params["w"]), rank=1)
    w = -jnp.zeros((9, 9))
    params = adapt(model, {"w": w}, KEY)
    assert np.signbit(np.asarray(model.apply(params))).all()
    # And the factors still learn from there.
    grads = jax.grad(lambda p: jnp.sum(model.apply(p)))(params)
    assert jnp.any(grads["lora"]["w"]["b"] != 0) and not jnp.any(grads["base"]["w"] != 0)


def test_dropout_drops_ranks_and_keeps_the_mean():
    c = case("mlp")
    model = lora(c.model, rank=4, dropout=0.5, targets="head/kernel")
    params = stirred(adapt(model, c.params, KEY))
    pair = params["lora"]["head/kernel"]
    # Only the low-rank path draws; the base's own dropout is that of the same key.
    seen = set()
    for seed in range(12):
        key = jax.random.key(seed)
        weights = model.apply.weights(params, key)["head"]["kernel"] - c.params["head"]["kernel"]
        terms = np.einsum("ir,ro->rio", 2 * np.float64(pair["a"]), np.float64(pair["b"]))
        share, *_ = np.linalg.lstsq(terms.reshape(4, -1).T, np.ravel(weights), rcond=None)
        np.testing.assert_allclose(share, np.round(share), atol=1e-4)
        seen |= set(np.round(share))
    assert seen == {0.0, 1.0}
    still = lora(c.model, rank=4, targets="head/kernel")
    same_bits(c.call(model, params), c.call(still, params))
    assert distance(c.call(model, params, KEY), c.call(still, params, KEY)) > 1e-3


def mesh():
    return jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))


GRADIENTS = {
    "accumulate": lambda g: accumulate(g, 4),
    "data_parallel over accumulate": lambda g: data_parallel(accumulate(g, 2), mesh()),
}


@pytest.mark.parametrize(("name", "base"), [("gpt", "int8"), ("linen", "float")])
def test_it_goes_with_transforms_of_losses_and_gradients(name, base):
    c = case(name)
    model = lora(quantize(c.model) if base == "int8" else c.model, rank=2, dropout=0.3)
    params = stirred(adapt(model, c.params, KEY))
    loss_fn = c.loss_fn(model)

    def grads(grad_fn, loss_fn=loss_fn, key=None):
        made = grad_fn(trainable_value_and_grad(loss_fn, model))
        return jax.jit(made)(params, c.batch, key, **c.options)

    # Against the plain gradient of the factors alone, which knows nothing of freezing.
    def of_factors(factors, key):
        return loss_fn({**params, "lora": factors}, c.batch, key, **c.options)[0]

    plain = jax.jit(jax.grad(of_factors))(params["lora"], KEY)
    (_, _), found = grads(lambda g: g, key=KEY)
    assert distance(found["lora"], plain) < ROUNDING
    assert {g.shape for g in jax.tree.leaves(found["base"])} == {()}
    (_, _), again = grads(lambda g: g, remat(loss_fn), KEY)
    assert distance(again["lora"], plain) < ROUNDING
    if name == "gpt":
        results = {n: grads(wrap, key=KEY)[1] for n, wrap in GRADIENTS.items()}
        same_bits(results["accumulate"], results["data_parallel over accumulate"])
        each = jax.jit(per_example(trainable_value_and_grad(loss_fn, model)))(params, c.batch, KEY)[
            1
        ]
        assert {g.shape[0] for g in jax.tree.leaves(each)} == {8}
        (loss, _), narrow = grads(lambda g: g, mixed_precision(loss_fn), KEY)
        assert loss.dtype == jnp.float32
        # bfloat16 keeps 8 bits: a few per cent of a gradient through two layers.
        assert 1e-4 < distance(narrow["lora"], plain) < 0.1


@pytest.mark.parametrize("name", ["gpt", "nnx"])
def test_training_leaves_the_base_alone_and_fuses_to_the_same_bits(name):
    c = case(name)
    model = lora(quantize(c.model), rank=2)
    params = adapt(model, c.params, KEY)
    optimizer = train_only(optax.adamw(1e-2, weight_decay=0.1), model)
    grad_fn = accumulate(trainable_value_and_grad(c.loss_fn(model), model), 2)
    step = train_step(grad_fn, optimizer)
    start = State.create(params, optimizer, KEY, c.state)
    moments = sum(x.size for x in jax.tree.leaves(start.opt_state))
    assert moments == 2 * count(model.spec["lora"]) + 1
    state = start
    run = jax.jit(step)
    for _ in range(3):
        state, _ = run(state, c.batch)
    same_bits(state.params["base"], params["base"])
    changed = [bool(jnp.any(x != 0)) for x in jax.tree.leaves(state.params["lora"])]
    assert all(changed)
    if name == "gpt":
        batches = jax.tree.map(lambda x: jnp.stack([x] * 3), c.batch)
        same_bits(jax.jit(fuse(step, 3))(start, batches)[0].params, state.params)


def test_mistakes_are_named():
    c = case("gpt")
    with pytest.raises(ConfigError, match=r"rank=0.*dropout=1.0") as error:
        lora(c.model, rank=0, dropout=1.0)
    assert "expected 1 or more" in str(error.value)
    with pytest.raises(ConfigError, match=r"rank=12 for embed/table: a matrix of 11 by 16"):
        lora(c.model, rank=12)
    with pytest.raises(ConfigError, match=r"norm/scale: its shape \(16,\)") as error:
        lora(c.model, rank=2, targets=("norm/*", "layers/*_norm/*"))
    assert "layers/mlp_norm/scale" in str(error.value)
    with pytest.raises(ConfigError, match="matches none"):
        lora(c.model, targets="layers/attentoin/*")
    with pytest.raises(ConfigError, match=r"adapt\(model, params, key\)"):
        adapt(lora(c.model, rank=2), c.params)
    with pytest.raises(ShapeError, match="before its edits"):
        adapt(lora(c.model, rank=2), {"w": jnp.ones(2)}, KEY)
    with pytest.raises(ConfigError, match="no float matrix"):
        spec = {"w": Param((2,), (None,), jax.nn.initializers.zeros)}
        lora(Model(spec, lambda p: p))


def test_init_draws_factors_that_start_as_the_base():
    c = case("mlp")
    model = lora(c.model, rank=2)
    params = init(model.spec, KEY)
    same_bits(c.call(model, params), c.call(c.model, params["base"]))
    same_bits(params["lora"], adapt(model, c.params, KEY)["lora"])
    spread = float(jnp.std(init(lora(c.model, rank=5).spec, KEY)["lora"]["hidden/0/kernel"]["a"]))
    assert abs(spread - 32**-0.5) < 0.25 * 32**-0.5  # 160 draws: 6% standard error
