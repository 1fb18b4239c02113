"""Logical axes to shardings: every fault is listed."""

import jax
import pytest
from jax.sharding import PartitionSpec

from fnml.core import LayoutError, Param, shardings

zeros = jax.nn.initializers.zeros


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def test_rules_give_partition_specs(mesh):
    spec = {
        "w": Param((8, 16, 3), ("embed", "mlp", None), zeros),
        "b": Param((16,), ("mlp",), zeros),
        "s": Param((), (), zeros),
        "r": Param((5,), ("other",), zeros),
    }
    found = shardings(spec, mesh, {"embed": "model", "mlp": ["data"], "absent": None})
    assert found["w"].spec == PartitionSpec("model", "data", None)
    assert found["b"].spec == PartitionSpec("data")
    assert found["s"].spec == PartitionSpec()
    assert found["r"].spec == PartitionSpec(None)
    assert all(sharding.mesh == mesh for sharding in found.values())
    both = shardings({"b": spec["b"]}, mesh, {"mlp": ("data", "model")})
    assert both["b"].spec == PartitionSpec(("data", "model"))
    assert both["b"].shard_shape((16,)) == (2,)


def test_every_size_that_does_not_divide_is_listed(mesh):
    spec = {"v": Param((3,), ("a",), zeros), "ok": Param((8,), ("a",), zeros)}
    spec["w"] = Param((8, 12), (None, "b"), zeros)
    with pytest.raises(LayoutError) as error:
        shardings({"x": spec}, mesh, {"a": "data", "b": ("model", "data")})
    text = str(error.value)
    assert "x/v: dimension 'a' has size 3, which 4 devices along ('data',) do not divide" in text
    assert "x/w: dimension 'b' has size 12, which 8 devices" in text
    assert "x/ok" not in text


def test_every_unknown_mesh_axis_is_listed_with_the_nearest(mesh):
    with pytest.raises(LayoutError) as error:
        shardings({}, mesh, {"a": "dta", "b": ("data", "modle")})
    text = str(error.value)
    assert "'a' -> 'dta'" in text
    assert "Did you mean 'data'?" in text
    assert "'b' -> 'modle'" in text
    assert "Did you mean 'model'?" in text


def test_a_mesh_axis_used_twice_is_listed_with_the_other_faults(mesh):
    spec = {"w": Param((8, 8), ("a", "b"), zeros), "z": Param((3,), ("a",), zeros)}
    with pytest.raises(LayoutError) as error:
        shardings(spec, mesh, {"a": "data", "b": "data"})
    assert "w: the mesh axis 'data' would shard both 'a' and 'b'" in str(error.value)
    assert "z: dimension 'a' has size 3" in str(error.value)
