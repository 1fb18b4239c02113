"""Param, and what follows from a tree of them: counts, shapes, initial values."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnml.core import ConfigError, Param, abstract, count, fold_name, init, is_param, shardings

normal = jax.nn.initializers.normal()
SPEC = {
    "embed": Param((16, 8), ("vocab", "embed"), normal),
    "layers": {
        "kernel": Param((4, 8, 24), ("layers", "embed", "mlp"), jax.nn.initializers.lecun_normal()),
        "scale": Param((8,), ("embed",), jax.nn.initializers.ones, jnp.bfloat16),
    },
    "temperature": Param((), (), normal),
}


def same_bits(a, b):
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_shapes_counts_and_bytes():
    assert count(SPEC) == 16 * 8 + 4 * 8 * 24 + 8 + 1
    assert SPEC["layers"]["scale"].nbytes == 16
    assert SPEC["temperature"].size == 1
    params = init(SPEC, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, abstract(SPEC))
    assert count(params) == count(SPEC)
    assert is_param(SPEC["embed"])
    assert not is_param(params["embed"])


@pytest.mark.parametrize(
    ("shape", "axes", "message"),
    [
        ((2, 3), ("embed",), r"shape \(2, 3\) has 2 dimensions, but 1 axis names"),
        ((), ("embed",), "0 dimensions, but 1"),
        ((2, 0), (None, None), "every size has to be at least 1"),
        ((-1,), (None,), "every size has to be at least 1"),
    ],
)
def test_a_wrong_description_is_refused(shape, axes, message):
    with pytest.raises(ConfigError, match=message):
        Param(shape, axes, normal)


@pytest.mark.parametrize("leaf", [jnp.ones(3), (2, 3), "kernel"])
def test_a_leaf_that_is_no_param_is_named(leaf):
    with pytest.raises(ConfigError, match=r"layers/1.*: expected a Param in the spec, got "):
        init({"layers": [SPEC["embed"], leaf]}, jax.random.key(0))


def test_each_array_is_drawn_from_the_key_of_its_path():
    key = jax.random.key(3)
    params = init(SPEC, key)
    for name, param, found in (
        ("embed", SPEC["embed"], params["embed"]),
        ("layers/kernel", SPEC["layers"]["kernel"], params["layers"]["kernel"]),
        ("temperature", SPEC["temperature"], params["temperature"]),
    ):
        # Compiled too: an operation at a time rounds the last bit otherwise.
        draw = jax.jit(param.init, static_argnums=(1, 2))
        drawn = draw(fold_name(key, name), param.shape, param.dtype)
        np.testing.assert_array_equal(found, drawn)


@pytest.mark.parametrize(
    "names",
    [["a", "b", "c", "d"], ["c", "b"], ["0", "a", "aa", "b", "b2", "c"], ["c"]],
    ids=["append", "reorder and remove", "insert", "one"],
)
def test_adding_removing_and_reordering_change_no_other_parameter(names):
    def draw(names):
        spec = {name: {"w": Param((3, 5), (None, None), normal)} for name in names}
        return init(spec, jax.random.key(1))

    base, other = draw(["a", "b", "c"]), draw(names)
    for name in base.keys() & other.keys():
        np.testing.assert_array_equal(other[name]["w"], base[name]["w"])
    values = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(other)])
    assert len(set(values.tolist())) == values.size


def test_two_seeds_differ():
    a, b = (init(SPEC, jax.random.key(seed)) for seed in (0, 1))
    assert not np.array_equal(a["embed"], b["embed"])


@pytest.mark.parametrize(
    "rules",
    [
        {"embed": "data"},
        {"embed": "model", "mlp": "data"},
        {"vocab": ("data", "model"), "mlp": ("model", "data")},
        {},
    ],
)
def test_sharded_initial_values_have_the_bits_of_unsharded_ones(rules):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    layout = shardings(SPEC, mesh, rules)
    params = init(SPEC, jax.random.key(0), layout)
    same_bits(params, init(SPEC, jax.random.key(0)))
    jax.tree.map(
        lambda x, s: chex.assert_equal(x.sharding.is_equivalent_to(s, x.ndim), True), params, layout
    )
    if rules:
        held = params["layers"]["kernel"].addressable_shards[0].data.size
        ways = 8 if len(rules) == 2 else 4
        assert held == SPEC["layers"]["kernel"].size // ways
