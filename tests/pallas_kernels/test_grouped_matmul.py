import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from kernel_cases import TOLERANCE, distance, races, strict_cuda, strict_tpu

from fnml.pallas_kernels import grouped_matmul
from fnml.pallas_kernels.grouped_matmul._visits import plan

BODIES = {
    "reference": {"implementation": "reference"},
    "lax": {"implementation": "lax"},
    "tpu": {"implementation": "pallas", "interpret": "tpu"},
}


def _draw(N, E, D, F, seed=0, dtype="float32"):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.normal(size=s), dtype) for s in ((N, D), (E, D, F), (N, F))]


def _textbook(x, w, grad, sizes):
    """The product and both gradients, row by row, in float64 NumPy."""
    x, w, grad = (np.asarray(a).astype(np.float64) for a in (x, w, grad))
    out, grad_x, grad_w = np.zeros(grad.shape), np.zeros(x.shape), np.zeros(w.shape)
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        out[row], grad_x[row] = x[row] @ w[group], w[group] @ grad[row]
        grad_w[group] += np.outer(x[row], grad[row])
    return out, grad_x, grad_w


def _both(x, w, grad, sizes, **options):
    out, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, **options), x, w)
    return out, *vjp(grad)


def _computed(x, w, grad, sizes, **options):
    return jax.jit(functools.partial(_both, **options))(x, w, grad, jnp.array(sizes))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(100, 0, 57), (128, 128, 44), (0, 0, 300)], ids=str)
def test_products_and_gradients_equal_float64(body, dtype, sizes):
    # 300 rows in tiles of 128: groups that share a tile, fill it, are empty, or leave rows over.
    arrays = _draw(300, 3, 128, 128, dtype=dtype)
    got = _computed(*arrays, sizes, **BODIES[body])
    assert [g.dtype for g in got] == [jnp.dtype(dtype)] * 3
    assert distance(got, _textbook(*arrays, sizes)) < TOLERANCE[dtype]


AUTO = jax.jit(_both)


@given(sizes=st.lists(st.integers(0, 25), min_size=3, max_size=3), many=st.booleans())
def test_any_sizes(sizes, many):
    # Tiles of 16 rows: 75 rows are four and a remainder, 7 are one; D and F fill no lanes.
    sizes = sizes if many else [size % 3 for size in sizes]
    arrays = _draw(75 if many else 7, 3, 5, 3)
    assert distance(AUTO(*arrays, jnp.array(sizes)), _textbook(*arrays, sizes)) < 5e-6


PLAN = jax.jit(plan, static_argnums=(1, 2))


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 32), min_size=3, max_size=3), tile=st.sampled_from([1, 8, 33, 96])
)
def test_visits_own_every_row_once_and_in_order(sizes, tile):
    rows = 96
    visits = jax.tree.map(np.asarray, PLAN(jnp.array(sizes), rows, tile))
    owner = np.full(rows, -1)
    for group, at, start, stop in zip(*visits, strict=True):
        assert at * tile <= start <= stop <= (at + 1) * tile
        assert (owner[start:stop] == -1).all()
        owner[start:stop] = group
    np.testing.assert_array_equal(owner[: sum(sizes)], np.repeat(np.arange(3), sizes))
    assert (owner[sum(sizes) :] == -1).all()
    # Every tile is visited, so that rows of no group are cleared, and never again later.
    assert (np.diff(visits.tile) >= 0).all()
    assert set(visits.tile) == set(range(-(-rows // tile)))
    assert (np.diff(visits.group) >= 0).all()


def test_no_races_and_no_reads_out_of_bounds():
    arrays, sizes = _draw(200, 2, 128, 128), (70, 90)
    options = {"implementation": "pallas", "interpret": strict_tpu()}
    got = _computed(*arrays, sizes, **options)
    assert not races()
    assert distance(got, _textbook(*arrays, sizes)) < TOLERANCE["float32"]


@pytest.mark.slow
def test_the_gpu_bodies_equal_float64_without_a_race():
    # 200 rows, filled up to two tiles of 128: the groups begin and end within them, one is empty,
    # and the last rows belong to none. They are not read: NaN stays there.
    arrays, sizes = _draw(200, 3, 128, 128, dtype="float16"), (70, 0, 90)
    x, w, grad = arrays
    unread = (jnp.arange(200) >= sum(sizes))[:, None]
    options = {"implementation": "pallas", "interpret": strict_cuda()}
    got = _computed(jnp.where(unread, jnp.nan, x), w, grad, sizes, **options)
    assert not races("cuda")
    assert distance(got, _textbook(*arrays, sizes)) < TOLERANCE["float16"]


def test_the_gpu_body_multiplies_wide_matrices():
    # A tile of 256 columns; the matrices are float32, as parameters are, and get rounded.
    (x, w, _), sizes = _draw(128, 2, 128, 256, dtype="bfloat16"), (50, 78)
    wide = w.astype(jnp.float32)
    got = grouped_matmul(x, wide, jnp.array(sizes), implementation="pallas", interpret="cuda")
    assert got.dtype == jnp.bfloat16
    want = _textbook(x, w, jnp.zeros((128, 256)), sizes)[0]
    assert distance(got, want) < TOLERANCE["bfloat16"]


def test_it_equals_ragged_dot():
    x, w, _ = _draw(37, 4, 8, 6)
    sizes = jnp.array([5, 0, 20, 9], jnp.int32)
    want = lax.ragged_dot(x[:34], w, sizes)
    assert distance(grouped_matmul(x, w, sizes)[:34], want) < TOLERANCE["float32"]


def test_second_derivatives_are_those_of_the_reference():
    x, w, _ = _draw(9, 2, 3, 4)
    sizes = jnp.array([4, 5])

    def twice(**options):
        def slope(x):
            return jnp.sum(
                jax.grad(lambda x: jnp.sum(grouped_matmul(x, w, sizes, **options) ** 3))(x) ** 2
            )

        return jax.jit(jax.grad(slope))(x)

    assert distance(twice(), twice(implementation="reference")) < 1e-5


def test_misuse_is_refused_with_every_fault():
    x, w = jnp.ones((4, 3)), jnp.ones((2, 3, 5))
    with pytest.raises(
        ValueError, match=r"w is float32 \(2, 3, 5\), expected floats \(E, 4, F\); g"
    ):
        grouped_matmul(jnp.ones((2, 4)), w, jnp.ones(2))
    both = r"tpu: .*multiples of 128, cuda: x is float32 .*multiples of 128"
    with pytest.raises(NotImplementedError, match=both):
        grouped_matmul(x, w, jnp.array([1, 3]), implementation="pallas")
