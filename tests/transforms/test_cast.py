"""cast: narrow in memory, as wide as before in the computation."""

import jax
import jax.numpy as jnp
import pytest
from adapted_models import KEY, NAMES, case, distance, same_bits

from fnml.core import ConfigError, init
from fnml.transforms import adapt, cast, merge, quantize


@pytest.mark.parametrize("name", NAMES)
def test_it_computes_with_the_rounded_weights(name):
    c = case(name)
    model = cast(c.model, "bfloat16")
    params = adapt(model, c.params)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), c.params)
    same_bits(merge(model, params), rounded)
    same_bits(c.call(model, params, KEY), c.call(c.model, rounded, KEY))
    drawn = jax.tree.map(lambda x: x.astype("bfloat16"), init(c.model.spec, KEY))
    same_bits(init(model.spec, KEY), drawn)


def test_it_takes_globs_and_can_hand_on_the_narrow_dtype():
    c = case("gpt")
    some = cast(c.model, "float16", ("embed/*", "layers/mlp/*"))
    kinds = {str(jnp.dtype(p.dtype)) for p in jax.tree.leaves(some.spec)}
    assert kinds == {"float16", "float32"} and some.spec["embed"]["table"].dtype == jnp.float16
    narrow = cast(c.model, "bfloat16", compute="bfloat16")
    params = adapt(narrow, c.params)
    same_bits(c.call(narrow, params), c.call(c.model, params))
    assert 1e-4 < distance(c.call(narrow, params), c.call(c.model, c.params)) < 0.05


def test_mistakes_are_named():
    c = case("mlp")
    with pytest.raises(ConfigError, match="expected a float"):
        cast(c.model, "int8")
    with pytest.raises(ConfigError, match="matches none"):
        cast(c.model, "bfloat16", "nowhere")
    with pytest.raises(ConfigError, match="head/kernel/scale: it is quantised"):
        cast(quantize(c.model), "bfloat16", "head/kernel/scale")
