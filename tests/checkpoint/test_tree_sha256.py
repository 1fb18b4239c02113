import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnml.checkpoint import tree_sha256
from fnml.core import ShapeError


def test_the_format_is_the_documented_one():
    """Written out by hand, so that a change of format, which breaks stored hashes, shows."""
    tree = {"w": jnp.array([[1.0, 2.0]]), "b": jnp.int32(3)}
    text = b'["b", "int32", []]\n' + np.int32(3).tobytes()
    text += b'["w", "float32", [1, 2]]\n' + np.array([1, 2], np.float32).tobytes()
    assert tree_sha256(tree) == hashlib.sha256(text).hexdigest()


def test_containers_order_and_device_do_not_matter():
    x, y = jnp.arange(8.0), jnp.ones((2, 3), jnp.bfloat16)
    want = tree_sha256({"a": [x, y]})
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    for sharding in (jax.NamedSharding(mesh, jax.P("d")), jax.NamedSharding(mesh, jax.P())):
        assert tree_sha256({"a": [jax.device_put(x, sharding), y]}) == want
    assert tree_sha256({"a": (np.asarray(x), jax.device_put(y, jax.devices()[3]))}) == want
    assert tree_sha256({"a": {"0": x, "1": y, "2": None}}) == want


@pytest.mark.parametrize(
    "other",
    [
        {"v": jnp.zeros(4)},
        {"w": jnp.zeros(5)},
        {"w": jnp.zeros((2, 2))},
        {"w": jnp.zeros(4, jnp.int32)},
        {"w": -jnp.zeros(4)},
        {"w": jnp.zeros(4), "x": jnp.zeros(0)},
        {},
    ],
)
def test_any_difference_matters(other):
    assert tree_sha256(other) != tree_sha256({"w": jnp.zeros(4)})


def test_typed_keys_count_with_their_generator():
    hashes = {tree_sha256({"k": jax.random.key(s, impl=i)}) for s in (0, 1) for i in ("rbg", None)}
    hashes.add(tree_sha256({"k": jax.random.key_data(jax.random.key(0))}))
    assert len(hashes) == 5


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(max_size=6), min_size=2, max_size=4), st.data())
def test_bytes_cannot_move_between_leaves(parts, data):
    """The same bytes, cut elsewhere, are another tree."""
    whole = b"".join(parts)
    cuts = sorted(data.draw(st.integers(0, len(whole)), label="cut") for _ in range(len(parts) - 1))
    again = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]

    def tree(pieces):
        return [np.frombuffer(piece, np.uint8) for piece in pieces]

    assert (tree_sha256(tree(parts)) == tree_sha256(tree(again))) == (parts == again)


def test_what_is_no_array_is_named():
    with pytest.raises(ShapeError, match="rate: float is no array"):
        tree_sha256({"rate": 0.1})
