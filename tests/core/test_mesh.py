"""Meshes from named sizes, from text, and what says where an activation lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fnml.core import ConfigError, LayoutError, constrain, make_mesh, parse_mesh


def test_a_mesh_has_the_devices_in_order_and_auto_axes():
    mesh = make_mesh({"data": 2, "model": 4})
    assert mesh.axis_names == ("data", "model")
    assert mesh.devices.tolist() == np.reshape(jax.devices(), (2, 4)).tolist()
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)


@given(st.permutations([2, 2, -1]), st.sampled_from([4, 8]))
def test_one_axis_is_the_rest(sizes, count):
    mesh = make_mesh(dict(zip("abc", sizes, strict=True)), jax.devices()[:count])
    assert mesh.size == count
    assert [n for n, size in zip(mesh.devices.shape, sizes, strict=True) if size == -1] == [
        count // 4
    ]


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"data": 3}, ["data=3", "there are 8", "1, 2, 4, 8 divide", "leave the rest idle"]),
        ({"data": 16}, ["of 16 devices", "there are 8"]),
        ({"data": -1, "model": 3}, ["3 does not divide the 8", "'data'", "1, 2, 4, 8"]),
        ({"data": -1, "model": -1}, ["at most once"]),
        ({"data": 0}, ["at least 1"]),
        ({}, ["needs an axis"]),
    ],
)
def test_a_mesh_that_does_not_come_out_is_refused(axes, words):
    with pytest.raises(LayoutError) as error:
        make_mesh(axes)
    assert all(word in str(error.value) for word in words), str(error.value)


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 64), min_size=1))
def test_text_and_axes_are_the_same(axes):
    assert parse_mesh(", ".join(f"{name} = {size}" for name, size in axes.items())) == axes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data", ["'data' is no axis=size"]),
        ("data=2,data=4", ["'data' is there twice"]),
        ("data=x,model=0", ["'data=x' is no axis=size", "'model=0'", "at least 1"]),
        ("data=2,", ["'' is no axis=size"]),
        ("a=-1,b=-1", ["only once"]),
    ],
)
def test_text_that_is_no_mesh_is_refused_with_every_fault(text, words):
    with pytest.raises(ConfigError) as error:
        parse_mesh(text)
    assert all(word in str(error.value) for word in words), str(error.value)


def lies(mesh, spec, x):
    """Return how the compiler lays out ``constrain(x, spec)``."""

    def placed(x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return constrain(x, spec)

    return jax.jit(placed)(jax.device_put(x, NamedSharding(mesh, P()))).sharding


def test_constrain_divides_along_the_axes_that_the_mesh_has():
    mesh, x = make_mesh({"data": 2, "model": 4}), jnp.ones((8, 4))
    for spec, expected in (
        (P("data", "model"), P("data", "model")),
        (P(("data", "expert")), P("data")),
        (P("elsewhere"), P()),
    ):
        assert lies(mesh, spec, x).is_equivalent_to(NamedSharding(mesh, expected), 2)


def test_constrain_does_nothing_without_a_mesh_and_leaves_out_what_is_mapped():
    x, mesh = jnp.ones((8, 4)), make_mesh({"data": 2, "model": 4})
    assert constrain(x, P("data")) is x
    mapped = jax.shard_map(
        lambda x: constrain(x, P("data")), mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    np.testing.assert_array_equal(jax.jit(mapped)(x), x)


def test_constrain_refuses_more_entries_than_dimensions():
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(LayoutError, match="at most 1"):
        constrain(jnp.ones(4), P(None, "data"))
