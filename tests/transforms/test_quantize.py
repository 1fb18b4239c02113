"""quantize: the bound that the scales imply, the bytes, and the order of transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapted_models import KEY, case, distance, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from fnml.core import ConfigError, LayoutError, Model, NonFiniteError, Param, abstract, init
from fnml.models import GPTConfig, gpt
from fnml.transforms import (
    adapt,
    cast,
    ensemble,
    lora,
    merge,
    prune,
    quantize,
    quantize_aware,
    trainable,
)


def weight(shape, axes):
    spec = {"w": Param(shape, axes, jax.nn.initializers.normal())}
    return Model(spec, lambda params: params["w"])


def textbook(w, bits, group, zero_point):
    """Round [inputs, outputs] in float64, a group and an output at a time."""
    out = np.empty_like(w)
    scales = np.empty_like(w)
    for start in range(0, len(w), group):
        for column in range(w.shape[1]):
            part = w[start : start + group, column]
            if zero_point:
                low, high = min(part.min(), 0.0), max(part.max(), 0.0)
                scale = (high - low) / (2**bits - 1) or 1.0
                zero = np.round(-low / scale)
                codes = np.clip(np.round(part / scale) + zero, 0, 2**bits - 1) - zero
            else:
                scale = np.abs(part).max() / (2 ** (bits - 1) - 1) or 1.0
                codes = np.round(part / scale)
            out[start : start + group, column] = codes * scale
            scales[start : start + group, column] = scale
    return out, scales


@settings(max_examples=25)
@given(
    bits=st.sampled_from([4, 8]),
    zero_point=st.booleans(),
    groups=st.sampled_from([(5, None), (6, 3), (7, 1)]),
    kind=st.sampled_from(["normal", "positive", "zeros", "tiny", "huge", "one"]),
    seed=st.integers(0, 99),
)
def test_the_error_is_at_most_half_a_step(bits, zero_point, groups, kind, seed):
    inputs, group = groups
    w = np.random.default_rng(seed).normal(size=(inputs, 3)).astype(np.float32)
    w = {
        "normal": w,
        "positive": np.abs(w) + 1,
        "zeros": 0 * w,
        "tiny": w * np.float32(1e-38),
        "huge": w * np.float32(1e37),
        "one": np.where(np.arange(inputs)[:, None] == 1, w, 0),
    }[kind]
    model = quantize(weight(w.shape, (None, None)), bits, group=group, zero_point=zero_point)
    stored = adapt(model, {"w": jnp.asarray(w)})
    found = np.float64(jax.jit(lambda p: merge(model, p))(stored)["w"])
    steps = np.repeat(np.float64(stored["w"]["scale"]), group or inputs, axis=0)
    largest = np.abs(np.float64(w)).max()
    assert np.all(np.abs(found - w) <= steps / 2 + 1e-6 * largest)
    assert np.all(found[w == 0] == 0)
    if kind != "tiny":  # there the scale is 1 and everything rounds to 0
        expected, scales = textbook(np.float64(w), bits, group or inputs, zero_point)
        assert np.all(steps <= scales * (1 + 1e-6) + 1e-30)
        # Ties may fall to either side: then the two are one step apart.
        near = np.abs(found - expected) <= 2e-6 * largest
        tie = np.abs(np.abs(found - expected) - scales) <= 1e-5 * scales
        assert np.all(near | tie) and near.mean() > 0.8


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp", {"bits": 8}),
        ("mlp", {"bits": 4, "group": 4, "zero_point": True}),
        ("cnn", {"bits": 4, "group": 3, "targets": "stem/conv"}),
        ("gpt", {"bits": 8, "group": 4, "targets": "layers/mlp/down"}),
        ("gpt", {"bits": 4}),
        ("linen", {"bits": 8, "zero_point": True}),
        ("nnx", {"bits": 4, "zero_point": True}),
    ],
)
def test_a_model_computes_with_the_weights_it_merges_to(name, options):
    c = case(name)
    model = quantize(c.model, **options)
    params = adapt(model, c.params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract(model.spec)
    )
    out = c.call(model, params, KEY)
    assert distance(out, c.call(c.model, merge(model, params), KEY)) < 5e-6
    coarse = {8: 0.05, 4: 0.6}[options["bits"]]
    assert 0 < distance(out, c.call(c.model, c.params, KEY)) < coarse


def test_layers_of_a_stack_have_scales_of_their_own():
    c = case("gpt")
    model = quantize(c.model, 8, targets="layers/attention/*")
    scaled = jax.tree.map(lambda x: x, c.params)
    query = c.params["layers"]["attention"]["query"]
    scaled["layers"]["attention"]["query"] = query * jnp.array([1.0, 100.0]).reshape(2, 1, 1, 1)
    scales = [adapt(model, p)["layers"]["attention"]["query"]["scale"] for p in (c.params, scaled)]
    same_bits(scales[0][0], scales[1][0])
    np.testing.assert_allclose(scales[1][1], 100 * scales[0][1], rtol=1e-6)


def test_bytes_are_what_they_should_be_before_there_are_weights():
    model = gpt(GPTConfig(vocab=256, width=64, layers=2, heads=4))

    def size(model):
        return sum(p.nbytes for p in jax.tree.leaves(model.spec))

    floats = size(model)
    for options, ratio in (
        ({"bits": 8}, 1 / 4),
        ({"bits": 4}, 1 / 8),
        ({"bits": 4, "group": 32}, (1 / 8 + 1 / 32)),
    ):
        small = quantize(model, **options)
        assert ratio * floats < size(small) < ratio * floats + 0.04 * floats, options
        if options == {"bits": 4}:
            drawn = init(small.spec, KEY)
            assert sum(x.nbytes for x in jax.tree.leaves(drawn)) == size(small)
            assert not jnp.any(merge(small, drawn)["layers"]["mlp"]["up"])


@settings(max_examples=6)
@given(rows=st.sampled_from([1, 4, 7]), zero_point=st.booleans(), seed=st.integers(0, 9))
def test_two_codes_share_a_byte(rows, zero_point, seed):
    w = np.random.default_rng(seed).normal(size=(2, rows, 3)).astype(np.float32)
    base = weight(w.shape, ("layers", None, None))
    four = quantize(base, 4, zero_point=zero_point)
    stored = adapt(four, {"w": jnp.asarray(w)})["w"]
    assert stored["codes"].shape == (2, (rows + 1) // 2, 3) and stored["codes"].dtype == jnp.uint8
    back = np.float64(jax.jit(lambda p: merge(four, p))({"w": stored})["w"])
    steps = np.float64(stored["scale"])
    assert np.all(np.abs(back - w) <= steps / 2 + 1e-6)


def test_pruned_weights_stay_zero_and_lora_trains_over_codes():
    c = case("gpt")
    pruned = prune(c.model, 0.5)
    model = quantize(pruned, 4, zero_point=True, targets="base/**/up")
    params = adapt(model, c.params)
    up = merge(model, params)["layers"]["mlp"]["up"]
    assert float(jnp.mean(up == 0)) >= 0.5
    kept = params["mask"]["layers/mlp/up"]
    assert not jnp.any(jnp.where(kept, 0, up))
    tuned = lora(quantize(c.model, 4), rank=2, targets="layers/mlp/up")
    params = adapt(tuned, c.params, KEY)
    same_bits(
        c.call(tuned, params), c.call(quantize(c.model, 4), adapt(quantize(c.model, 4), c.params))
    )
    assert not any(jax.tree.leaves(trainable(tuned)["base"]))
    assert all(jax.tree.leaves(trainable(tuned)["lora"]))


def test_a_cast_model_and_an_ensemble_quantise():
    c = case("mlp")
    for model in (quantize(cast(c.model, "bfloat16")), cast(quantize(c.model), "bfloat16")):
        params = adapt(model, c.params)
        assert params["head"]["kernel"]["codes"].dtype == jnp.int8
        assert params["head"]["kernel"]["scale"].dtype == jnp.float32
        assert params["head"]["bias"].dtype == jnp.bfloat16
        assert distance(c.call(model, params), c.call(c.model, c.params)) < 0.03
    both = ensemble(c.model, 2)
    params = init(both.spec, KEY)
    stored = adapt(quantize(both), params)["head"]["kernel"]
    alone = adapt(quantize(c.model), jax.tree.map(lambda x: x[1], params))["head"]["kernel"]
    same_bits(stored["codes"][1], alone["codes"])
    np.testing.assert_array_equal(stored["scale"][1], alone["scale"])


def test_refused_orders_name_the_one_that_works():
    m = case("mlp").model
    for refused, works in (
        (lambda: quantize(lora(m, rank=2)), "lora(quantize(model"),
        (lambda: prune(quantize(m)), "quantize(prune(model"),
        (lambda: quantize(quantize_aware(m)), "adapt(quantize(model"),
        (lambda: quantize_aware(quantize(m)), "rounded once"),
        (lambda: quantize_aware(quantize_aware(m)), "rounded once"),
        (lambda: quantize_aware(lora(m, rank=2)), "lora(quantize(model"),
    ):
        with pytest.raises(LayoutError) as error:
            refused()
        assert works in str(error.value) and "cannot go around" in str(error.value)
    with pytest.raises(ConfigError, match="no float matrix"):
        quantize(quantize(m))
    with pytest.raises(ConfigError, match="quantised already"):
        quantize(quantize(m), targets="head/kernel/*")


def test_mistakes_are_named():
    c = case("mlp")
    with pytest.raises(ConfigError, match=r"bits=5.*group=7 does not divide the 16") as error:
        quantize(c.model, 5, group=7)
    assert "32 inputs of hidden/0/kernel" in str(error.value)
    with pytest.raises(ConfigError, match="group=0"):
        quantize(c.model, 4, group=0)
    with pytest.raises(ConfigError, match="is no matrix"):
        quantize(c.model, targets="head/*")
    bad = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), c.params)
    with pytest.raises(NonFiniteError, match=r"hidden/0/kernel|head/kernel"):
        adapt(quantize(c.model), bad)
    params = adapt(quantize(c.model), c.params)
    with pytest.raises(TypeError, match="int8"):
        jax.grad(lambda p: jnp.sum(c.call(quantize(c.model), p)))(params)
    assert optax.tree.size(params) > 0
