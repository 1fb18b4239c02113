"""SwiGLU, GELU and rotary positions in C++: values, gradients, and what they take."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnml.core import ShapeError
from fnml.models import Rotation, gelu, rotate, rotation, swiglu
from fnml.pallas_kernels import native_faults, native_kernels

pytestmark = pytest.mark.skipif(bool(native_faults()), reason="; ".join(native_faults()))


def sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(x, -700, None)))


def swiglu_textbook(gate, up, grad):
    """SwiGLU and its gradients in float64."""
    share = sigmoid(gate)
    return gate * share * up, grad * up * share * (1 + gate * (1 - share)), grad * gate * share


def gelu_textbook(x, grad):
    """GELU in its tanh form and its gradient in float64, as they are commonly written."""
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    tanh = np.tanh(inner)
    return 0.5 * x * (1 + tanh), grad * (0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * slope)


def rotate_textbook(x, cos, sin, grad):
    """Turn pairs as complex numbers, in float64; and the gradients."""
    half = x.shape[-1] // 2

    def pairs(x):
        return x[..., :half] + 1j * x[..., half:]

    def parts(z):
        return np.concatenate([z.real, z.imag], -1)

    by = (cos + 1j * sin)[..., None, :]
    axes = (0, 2) if cos.ndim == 2 else (2,)
    # The gradient of the angle's two parts: the inner products with x, and with x turned by 90.
    along = (pairs(grad) * np.conj(pairs(x))).sum(axes)
    return parts(pairs(x) * by), parts(pairs(grad) * np.conj(by)), along.real, along.imag


def floats(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def with_gradients(function, *arrays):
    """Values and gradients in the scope, for a gradient that is the last array."""
    *arrays, grad = floats(*arrays)
    with native_kernels():
        assert "fnml_" in str(jax.make_jaxpr(function)(*arrays))
        out, back = jax.vjp(jax.jit(function), *arrays)
        return [out, *back(grad)]


def distance(found, expected):
    """Relative, or to the size of the standard normal inputs where the expected is smaller."""
    assert [x.shape for x in found] == [x.shape for x in expected]
    return max(
        np.linalg.norm(np.asarray(x, np.float64) - y) / max(np.linalg.norm(y), y.size**0.5)
        for x, y in zip(found, expected, strict=True)
    )


SHAPES = st.lists(st.integers(1, 60), min_size=1, max_size=3).map(tuple)


@settings(max_examples=12, deadline=None)
@given(shape=SHAPES, size=st.sampled_from([0.1, 1.0, 10.0]), seed=st.integers(0, 99))
def test_swiglu_is_the_textbooks_in_float64_to_rounding(shape, size, seed):
    gate, up, grad = np.random.default_rng(seed).normal(size=(3, *shape))
    found = with_gradients(swiglu, size * gate, up, grad)
    # A few roundings; the input itself is rounded, which a large gate's sigmoid magnifies.
    assert distance(found, swiglu_textbook(size * gate, up, grad)) < 2e-6


@settings(max_examples=12, deadline=None)
@given(shape=SHAPES, size=st.sampled_from([0.1, 1.0, 10.0]), seed=st.integers(0, 99))
def test_gelu_is_the_tanh_form_in_float64_to_rounding(shape, size, seed):
    x, grad = np.random.default_rng(seed).normal(size=(2, *shape))
    found = with_gradients(gelu, size * x, grad)
    assert distance(found, gelu_textbook(size * x, grad)) < 2e-6


@settings(max_examples=12, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 40, 4))),
    half=st.integers(1, 40),
    batched=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rotate_turns_complex_numbers_in_float64_to_rounding(shape, half, batched, seed):
    rng = np.random.default_rng(seed)
    x, grad = rng.normal(size=(2, *shape, 2 * half))
    cos, sin = rng.normal(size=(2, *shape[not batched : 2], half))
    found = with_gradients(lambda x, cos, sin: rotate(x, Rotation(cos, sin)), x, cos, sin, grad)
    assert distance(found, rotate_textbook(x, cos, sin, grad)) < 2e-6


@pytest.mark.parametrize("size", [50.0, 88.0, 1e4, 1e13])
def test_far_from_zero_nothing_is_lost_or_made_up(size):
    x, one = np.array([-size, size, -0.0, 0.0]), np.ones(4)
    want = [0, size, 0, 0]
    for found, slope in (
        (with_gradients(swiglu, x, one, one), 0.5),
        (with_gradients(gelu, x, one), 0.5),
    ):
        np.testing.assert_allclose(found[0], want, rtol=1e-6, atol=1e-18)
        np.testing.assert_allclose(found[1], [0, 1, slope, slope], rtol=1e-6, atol=1e-18)


def test_a_nan_that_carries_something_stays_one():
    x = jnp.asarray(np.array([0x7FC00001, 0xFFC001FF, 0x7F800001], np.uint32).view(np.float32))
    with native_kernels():
        assert np.isnan(gelu(x)).all() and np.isnan(swiglu(x, jnp.ones(3))).all()


def test_an_odd_head_is_refused_as_outside_the_scope():
    with native_kernels(), pytest.raises(ShapeError):
        rotate(jnp.ones((1, 4, 2, 5)), rotation(jnp.arange(4), 4))


def test_a_nan_stays_where_it_is_and_is_not_swallowed():
    x, one = np.ones((3, 7)), np.ones((3, 7))
    x[1, 2] = np.nan
    by = rotation(np.arange(3), 6)
    cases = [
        with_gradients(swiglu, x, one, one),
        with_gradients(swiglu, one, x, one)[:2],
        with_gradients(gelu, x, one),
    ]
    for found in cases:
        for y in found:
            np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
    with native_kernels():
        turned = rotate(jnp.asarray(x[:, :6], jnp.float32)[None, :, None], by)[0, :, 0]
    assert np.isnan(turned).sum() == 2 and np.isnan(turned[1, jnp.array([2, 5])]).all()


CASES = {
    "swiglu": (swiglu, [(4, 6, 2, 8), (4, 6, 2, 8)]),
    "gelu": (gelu, [(4, 6, 2, 8)]),
    "rotate": (lambda x: rotate(x, rotation(np.arange(6), 8)), [(4, 6, 2, 8)]),
}


def case(name, seed=0):
    function, shapes = CASES[name]
    rng = np.random.default_rng(seed)
    return function, floats(*(rng.normal(size=shape) for shape in shapes))


@pytest.mark.parametrize("name", CASES)
def test_every_piece_of_a_large_array_is_computed_as_it_is_alone(name):
    # 20,480 numbers are two pieces of work.
    function, shapes = CASES[name]
    rng = np.random.default_rng(0)
    arrays = floats(*(rng.normal(size=(213, *shape[1:])) for shape in shapes))
    with native_kernels():
        together = function(*arrays)
        for rows in (slice(0, 100), slice(100, 213)):
            np.testing.assert_array_equal(together[rows], function(*(x[rows] for x in arrays)))


@pytest.mark.parametrize("name", CASES)
def test_outside_the_scope_nothing_changes(name):
    function, arrays = case(name)

    def program():
        return str(jax.make_jaxpr(lambda *x: jax.vjp(function, *x)[1](arrays[0]))(*arrays))

    before = program()
    with native_kernels():
        assert program().count("ffi_call") == 2
        traced = jax.jit(function).trace(*arrays)
        assert "fnml_" not in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "fnml_" not in before and "custom_vjp" not in before
    assert program() == before


def test_other_dtypes_shapes_and_sizes_keep_their_form():
    half, square, row = jnp.ones((2, 2), jnp.bfloat16), jnp.ones((2, 2)), jnp.ones((1, 2))
    by = rotation(np.arange(2), 2)
    with native_kernels():
        for function, arrays in (
            (swiglu, (half, half)),
            (swiglu, (square, row)),
            (gelu, (half,)),
            (gelu, (jnp.ones((0, 2)),)),
            (lambda x: rotate(x, by), (jnp.ones((1, 2, 1, 2), jnp.bfloat16),)),
            (
                lambda x: rotate(x, Rotation(*(jnp.stack([t] * 3) for t in by))),
                (square[None, :, None],),
            ),
        ):
            assert "fnml_" not in str(jax.make_jaxpr(function)(*arrays))
        assert float(gelu(2.0)) == pytest.approx(1.9546, abs=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_vmapped_it_is_the_plain_form(name):
    function, arrays = case(name)
    mapped = jax.jit(jax.vmap(lambda *x: function(*(a[None] for a in x))[0]))
    expected = mapped(*arrays)
    with native_kernels():
        assert "fnml_" not in mapped.lower(*arrays).as_text()
        np.testing.assert_array_equal(mapped(*arrays), expected)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_those_of_the_plain_form(name):
    function, arrays = case(name)

    def slope(*x):
        return (jax.grad(lambda *x: (function(*x) ** 3).sum())(*x) ** 2).sum()

    want = jax.grad(slope)(*arrays)
    with native_kernels():
        found = jax.grad(slope)(*arrays)
    assert distance([found], [np.float64(want)]) < 1e-5
