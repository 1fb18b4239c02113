"""Pictures say what JAX does: shapes, bytes and devices of every array."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fnml.core import LayoutError, Param, ShapeError, State, make_mesh, shardings
from fnml.parallel import FSDP, TENSOR, combine, picture
from fnml.transforms import state_shardings

MESH = make_mesh({"data": 2, "model": 4})
SPEC = {
    "kernel": Param((8, 16), ("embed", "mlp"), jax.nn.initializers.zeros),
    "bias": Param((6,), (None,), jax.nn.initializers.zeros),
}


def placed(tree, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(MESH, spec)), tree, specs)


def test_the_text_says_what_lies_where():
    text = picture(SPEC, shardings(SPEC, MESH, combine(FSDP, TENSOR)))
    assert [re.split(r"  +", line.strip()) for line in text.splitlines()] == [
        ["mesh data=2, model=4 of 8 cpu"],
        ["array", "shape", "axes", "divided by", "on a device", "bytes there", "copies"],
        ["bias", "6", "-", "-", "6", "24 B", "8"],
        ["kernel", "8x16", "embed, mlp", "data, model", "4x4", "64 B", "1"],
        ["536 B in all, 88 B on a device"],
    ]


def test_the_rows_are_what_the_devices_hold():
    params = {"kernel": jnp.ones((8, 16)), "deep": jnp.ones((3, 4, 8), jnp.bfloat16)}
    optimizer = optax.adam(1e-3)
    state = State.create(params, optimizer, jax.random.key(0))
    where = {
        "kernel": NamedSharding(MESH, P(None, ("data", "model"))),
        "deep": NamedSharding(MESH, P(None, "model", "data")),
    }
    state = jax.device_put(state, state_shardings(state, where))
    rows = picture(state).rows
    for row, x in zip(rows, jax.tree.leaves(state), strict=True):
        shard = x.addressable_shards[0].data
        assert row.local == shard.shape
        held = [str(s.index) for s in x.addressable_shards]
        assert row.copies == held.count(held[0])
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            assert row.nbytes == shard.nbytes


def test_the_drawing_numbers_the_devices_that_hold_each_part():
    x = placed({"x": jnp.ones((4, 8))}, {"x": P("data", None)})
    drawn = picture(x)._repr_html_()
    labels = re.findall(r"<text[^>]*>([\d,]*)</text>", drawn)
    holders = {}
    for shard in x["x"].addressable_shards:
        holders.setdefault(shard.index[0].start or 0, []).append(shard.device.id)
    assert labels == [",".join(map(str, sorted(holders[at]))) for at in sorted(holders)]
    both = picture(placed({"x": jnp.ones((4, 8))}, {"x": P("model", "data")}))._repr_html_()
    assert re.findall(r"<text[^>]*>([\d,]*)</text>", both) == list("04152637")


def test_names_are_escaped_and_a_large_mesh_has_no_numbers():
    mesh = jax.sharding.Mesh(np.array(jax.devices() * 16).reshape(128), ("data",))
    drawn = picture(
        {"<b>": jax.ShapeDtypeStruct((256,), jnp.float32)}, {"<b>": NamedSharding(mesh, P("data"))}
    )
    assert "&lt;b&gt;" in drawn._repr_html_() and "<b>" not in drawn._repr_html_()
    assert set(re.findall(r"<text[^>]*>([\d,]*)</text>", drawn._repr_html_())) == {""}


def test_what_has_no_place_is_refused_by_name():
    with pytest.raises(LayoutError, match="a: SingleDeviceSharding, b: NoneType"):
        picture({"a": jnp.ones(2), "b": jax.ShapeDtypeStruct((2,), jnp.float32)})
    with pytest.raises(ShapeError, match="without arrays"):
        picture({})
    with pytest.raises(ShapeError, match="a sharding for each array"):
        picture(SPEC, {"kernel": NamedSharding(MESH, P())})
