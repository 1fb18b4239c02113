"""Gathers and scatters of every form."""

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime as ort
import pytest
from exported import ops, same
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from fnml.interop.onnx import to_onnx

X = jax.random.normal(jax.random.key(0), (3, 4, 5))
# One place is outside of the first axis, the last is outside of every axis.
PLACES = jnp.array([0, 2, 3, 5])


def test_indexing() -> None:
    def everything(x, i):
        plain = [x[i % 3], x[:, i % 4], x[i % 3, i % 4], x[..., i % 5], x[0], x[:, 1], x[-1, :, 2]]
        modes = [x.at[i].get(mode=mode) for mode in ("fill", "clip", "promise_in_bounds")]
        modes.append(x.at[:, i - 4].get(mode="fill", fill_value=3.0))
        along = jnp.take_along_axis(x, i[:3, None, None] % 4, 1)
        integers = (x * 9).astype(jnp.int32).at[i].get(mode="fill")
        return plain, modes, along, integers

    same(everything, X, PLACES)


def test_looking_up_a_table_is_one_gather() -> None:
    model = to_onnx(lambda x, i: x.at[i].get(mode="promise_in_bounds"), X, jnp.array([[1, 2]]))
    assert "GatherND" not in ops(model) and ops(model).count("Gather") == 1


def test_writing() -> None:
    def everything(x, i):
        combined = [x.at[i].add(1.0), x.at[i].multiply(2.0), x.at[i].min(0.0), x.at[i].max(0.0)]
        outside = [
            x.at[:, i].add(1.0, mode="drop"),
            x.at[i, i].set(2.0, mode="clip"),
            x.at[i].set(1.0),
        ]
        sliced = [x.at[0].set(7.0), x.at[:, 1].add(7.0), x.at[..., ::2].set(0.0), x.at[:].add(x)]
        met = x.at[jnp.array([1, 1, 1])].add(x)
        return combined, outside, sliced, met, (x > 0).at[i].set(True)

    same(everything, X, PLACES)


def test_batched() -> None:
    def everything(x, i):
        return (
            jax.vmap(lambda x, i: x[i])(x, i),
            jax.vmap(lambda x, i: x.at[i].add(1.0))(x, i),
            jax.vmap(lambda x, i: x.at[i].set(1.0))(x, i),
            jax.vmap(lambda x, i: lax.dynamic_slice(x, (i[0], i[1]), (2, 2)))(x, i),
            jax.vmap(lambda x, i: lax.dynamic_update_slice(x, x[:2, :2], (i[0], i[1])))(x, i),
        )

    same(everything, X, jnp.array([[0, 2], [1, 1], [3, 3]]))


def test_gradients() -> None:
    def loss(x, i):
        return (x[i] ** 2).sum() + (jnp.take_along_axis(x, i[:, None, None] % 4, 1) ** 2).sum()

    same(jax.grad(loss), X, jnp.array([0, 2, 2]))


@pytest.mark.parametrize("columns", [(), (16,)])
def test_updates_that_meet_are_not_lost_to_threads(columns: tuple[int, ...]) -> None:
    """As ScatterND they would be, in onnxruntime 1.32 with several threads."""

    def count(i):
        return jnp.zeros((20, *columns)).at[i].add(1.0)

    places = jnp.arange(40_000) % 20
    options = ort.SessionOptions()
    options.intra_op_num_threads = 4
    model = to_onnx(count, places)
    # The threads do not always collide: the operator is what decides.
    assert "ScatterElements" in ops(model) and "ScatterND" not in ops(model)
    data = model.SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    for _ in range(5):
        [counts] = session.run(None, {"i": np.asarray(places)})
        assert counts.min() == counts.max() == 2000


@st.composite
def gathers(draw):
    """An operand, indices, and dimension numbers that fit them."""
    rank = draw(st.integers(1, 3))
    shape = tuple(draw(st.integers(1, 4)) for _ in range(rank))
    batching = draw(st.booleans()) and rank > 1
    batch = (shape[0],) if batching else tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    free = list(range(int(batching), rank))
    mapped = draw(st.lists(st.sampled_from(free), unique=True))
    collapsed = [d for d in mapped if draw(st.booleans())]
    sizes = [
        1 if d in collapsed or (batching and d == 0) else draw(st.integers(1, shape[d]))
        for d in range(rank)
    ]
    own = len(free) - len(collapsed)
    offsets = draw(st.permutations(range(len(batch) + own)))[:own]
    start = draw(
        st.lists(
            st.integers(-2, 5),
            min_size=int(np.prod(batch)) * len(mapped),
            max_size=int(np.prod(batch)) * len(mapped),
        )
    )
    numbers = {
        "map": tuple(mapped),
        "single": tuple(sorted(collapsed)),
        "windows": tuple(sorted(offsets)),
        "batched": (0,) if batching else (),
    }
    indices = np.array(start, np.int32).reshape((*batch, len(mapped)))
    mode = draw(st.sampled_from(["clip", "fill"]))
    return shape, indices, tuple(sizes), numbers, mode


@settings(max_examples=25)
@given(gathers())
def test_every_gather(case) -> None:
    shape, indices, sizes, numbers, mode = case
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    dimensions = lax.GatherDimensionNumbers(
        offset_dims=numbers["windows"],
        collapsed_slice_dims=numbers["single"],
        start_index_map=numbers["map"],
        operand_batching_dims=numbers["batched"],
        start_indices_batching_dims=numbers["batched"],
    )
    same(lambda x, i: lax.gather(x, i, dimensions, sizes, mode=mode), x, indices, importer=False)


@settings(max_examples=25)
@given(gathers(), st.sampled_from(["add", "mul", "min", "max"]))
def test_every_scatter(case, kind: str) -> None:
    shape, indices, sizes, numbers, mode = case
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape) + 1
    batch = indices.shape[:-1]
    single = (*numbers["single"], *numbers["batched"])
    windows = [sizes[d] for d in range(len(shape)) if d not in single]
    given_shape = list(batch)
    for place, size in zip(numbers["windows"], windows, strict=True):
        given_shape.insert(place, size)
    updates = jnp.arange(1, 1 + np.prod(given_shape), dtype=jnp.float32).reshape(given_shape) % 5
    dimensions = lax.ScatterDimensionNumbers(
        update_window_dims=numbers["windows"],
        inserted_window_dims=numbers["single"],
        scatter_dims_to_operand_dims=numbers["map"],
        operand_batching_dims=numbers["batched"],
        scatter_indices_batching_dims=numbers["batched"],
    )
    scatter = {"add": lax.scatter_add, "mul": lax.scatter_mul}.get(kind) or {
        "min": lax.scatter_min,
        "max": lax.scatter_max,
    }[kind]
    same(
        lambda x, i, u: scatter(x, i, u, dimensions, mode=mode), x, indices, updates, importer=False
    )
