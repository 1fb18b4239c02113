"""What moves arrays: shapes, slices, padding, and sizes that are known when a file runs."""

import jax
import jax.numpy as jnp
import pytest
from exported import ops, run, same
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from fnml.core import ConfigError
from fnml.interop.onnx import UnsupportedError, to_onnx

X = jax.random.normal(jax.random.key(0), (3, 4, 5))


def test_rearrangements() -> None:
    def everything(x):
        turned = [
            x.T,
            x[::-1],
            jnp.flip(x, (0, 2)),
            jnp.roll(x, 2, 1),
            x[..., None],
            x.reshape(6, -1),
        ]
        cut = [x[:, ::2], x[1:, :-1, 2:4], x[0], x[:, -1], *jnp.split(x, [1, 2], 1)]
        grown = [jnp.tile(x, (1, 2, 1)), jnp.repeat(x, 2, axis=1), jnp.stack([x, x], 1)]
        grown += [jnp.concatenate([x, x], -1), jnp.broadcast_to(x[:, None], (3, 2, 4, 5))]
        made = [
            jnp.arange(7.0),
            jnp.eye(3),
            jnp.zeros((2, 3)),
            jnp.tri(4),
            x.mean(1, keepdims=True),
        ]
        return turned, cut, grown, made

    same(everything, X)


@settings(max_examples=15)
@given(
    st.lists(
        st.tuples(st.integers(-1, 2), st.integers(-1, 2), st.integers(0, 2)), min_size=2, max_size=2
    )
)
def test_padding_of_every_kind(config) -> None:
    same(lambda x: lax.pad(x, jnp.float32(7), config), X[:, :, 0], importer=False)


def test_padding_is_imported_again() -> None:
    same(lambda x: lax.pad(x, jnp.float32(7), ((-1, 2, 1), (0, -2, 0), (1, 1, 2))), X)


@pytest.mark.parametrize("place", [-2, 0, 1, 9])
def test_computed_slices_fit_as_in_jax(place: int) -> None:
    def both(x, i, update):
        return (
            lax.dynamic_slice(x, (i, i, 0), (2, 1, 5)),
            lax.dynamic_update_slice(x, update, (i, i, i)),
            lax.dynamic_update_slice_in_dim(x, update[:, :, :1] * jnp.ones((1, 4, 1)), i, 2),
        )

    same(both, X, jnp.int32(place), jnp.ones((3, 1, 2)), importer=place == 9)


def test_symbolic_sizes_in_every_operation() -> None:
    def everything(x, i):
        B, T = x.shape
        shaped = [x.reshape(-1), x.reshape(B // 1, T), jnp.pad(x, ((0, 1), (2, 1))), x.T @ x]
        joined = [
            jnp.concatenate([x, x], 0),
            jnp.broadcast_to(x[:, None], (B, 3, T)),
            jnp.ones(x.shape),
        ]
        cut = [x[:, :-1], x[1:], x[:, i], lax.dynamic_slice(x, (i, 0), (1, T)), x[:, ::-1]]
        counted = [
            jnp.arange(B) % 3,
            jnp.eye(T),
            jnp.arange(2 * B + 1),
            x[:, : T // 2],
            jnp.zeros(T % 3 + 1),
            x.sum(0) / B,
            x.mean(),
        ]
        along = [jnp.cumsum(x, 0), jnp.sort(x, 1), lax.cumprod(x, 0), jax.nn.softmax(x)]
        return shaped, joined, cut, counted, along

    options = {"dynamic": {"x": "B, T"}, "constraints": ("T >= 2",)}
    model = same(everything, X[0], jnp.int32(1), **options)
    # The very file runs at other sizes too.
    other = jax.random.normal(jax.random.key(1), (2, 7))
    expected = jax.tree.leaves(everything(other, jnp.int32(1)))
    for got, want in zip(run(model, other, jnp.int32(1)), expected, strict=True):
        assert jnp.allclose(got, want, rtol=1e-5, atol=1e-6), (got, want)


def test_gradients_through_symbolic_sizes() -> None:
    def loss(x):
        return (x[:, :-1] ** 2).mean() + (x.reshape(-1) ** 3).sum()

    same(jax.grad(loss), X[0], dynamic="B, T", constraints=("T >= 2",))


def test_shape_arithmetic_takes_few_nodes() -> None:
    def split_heads(x):
        return x.reshape(*x.shape[:2], 2, 2)

    model = same(split_heads, jnp.ones((3, 5, 4)), dynamic="B, T, _")
    assert ops(model) == ["Reshape"]
    model = same(
        lambda x: x.reshape(-1, 4) @ jnp.ones((4, 2)), jnp.ones((3, 5, 4)), dynamic="B, T, _"
    )
    assert ops(model).count("Shape") == 0


def test_dynamic_by_name_prefix_and_tree() -> None:
    def loss(batch, scale):
        return batch["x"].sum(0) * scale + batch["y"].sum(0)

    batch = {"x": jnp.ones((4, 3)), "y": jnp.ones((4, 3))}
    for dynamic in (
        {"batch": "B, ..."},
        {"batch/x": "B, _", "batch/y": "B, 3"},
        ("B, ...", None),
        ({"x": "B, _", "y": "B, _"}, None),
    ):
        model = to_onnx(loss, batch, jnp.float32(2), dynamic=dynamic)
        shapes = [
            [d.dim_param or d.dim_value for d in port.type.tensor_type.shape.dim]
            for port in model.graph.input
        ]
        assert shapes == [["B", 3], ["B", 3], []]


@pytest.mark.parametrize(
    ("dynamic", "said"),
    [
        ({"tokns": "B"}, "tokens"),
        ({"tokens": "B, T, D"}, "tokens: 'B, T, D' for an array [2, 3]"),
        ({"tokens": "B, 4"}, "tokens"),
        ("B, ...", "scale"),
        (("B, _", None, None), "no prefix"),
    ],
)
def test_dynamic_that_does_not_fit_is_refused(dynamic, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_onnx(lambda tokens, scale: tokens * scale, jnp.ones((2, 3)), 2.0, dynamic=dynamic)
    assert said in str(caught.value)


def test_a_decision_by_a_symbolic_size_is_refused_with_the_way_out() -> None:
    def clipped(x):
        return x[:4] if x.shape[0] > 4 else x

    with pytest.raises(UnsupportedError, match="constraints"):
        to_onnx(clipped, jnp.ones(3), dynamic="B")
    assert to_onnx(clipped, jnp.ones(3), dynamic="B", constraints=("B <= 4",)).graph.output[0].name
