import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fnml.core import ShapeError
from fnml.models import linear, linears

KEY = jax.random.key(0)


def _draw(name, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.fold_in(KEY, name), shape, dtype)


def _norm_error(got, expected):
    expected = np.asarray(expected, np.float64)
    return np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 3, 4)])
def test_value_and_gradients_equal_numpy(lead):
    x, kernel, bias, grad = (
        _draw(0, (*lead, 7)),
        _draw(1, (7, 6)),
        _draw(2, (6,)),
        _draw(3, (*lead, 6)),
    )
    out, vjp = jax.vjp(linear, x, kernel, bias)
    x64, k64, b64, g64 = (np.asarray(a, np.float64) for a in (x, kernel, bias, grad))
    rows, grads = x64.reshape(-1, 7), g64.reshape(-1, 6)
    # Sums of at most 24 float32 terms: a few units of 1.2e-7.
    assert _norm_error(out, x64 @ k64 + b64) < 1e-6
    back = vjp(grad)
    expected = ((grads @ k64.T).reshape(x.shape), rows.T @ grads, grads.sum(0))
    for got, want in zip(back, expected, strict=True):
        assert got.shape == want.shape
        assert _norm_error(got, want) < 1e-6


def test_second_derivatives_in_float64():
    with jax.enable_x64(True):
        x, kernel = _draw(0, (2, 3), jnp.float64), _draw(1, (3, 4), jnp.float64)
        check_grads(lambda x, k: jnp.sin(linear(x, k)), (x, kernel), order=2, modes=["rev"])


def test_bfloat16_activations_give_float32_kernel_gradients():
    x, kernel = _draw(0, (4096, 2)).astype(jnp.bfloat16), _draw(1, (2, 3))
    out, vjp = jax.vjp(linear, x, kernel)
    grad_x, grad_kernel = vjp(jnp.ones_like(out))
    assert (out.dtype, grad_x.dtype, grad_kernel.dtype) == (x.dtype, x.dtype, jnp.float32)
    exact = np.asarray(x, np.float64).sum(0)[:, None] * np.ones((1, 3))
    # A sum kept in bfloat16 would be wrong in the third digit.
    assert _norm_error(grad_kernel, exact) < 1e-5


def test_out_dtype_keeps_the_precision_of_the_sum():
    x, kernel = _draw(0, (8, 64)).astype(jnp.bfloat16), _draw(1, (64, 5)).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    out = linear(x, kernel, out_dtype=jnp.float32)
    assert out.dtype == jnp.float32
    assert _norm_error(out, exact) < 1e-6
    assert _norm_error(linear(x, kernel), exact) > 1e-4
    grad = jax.grad(lambda x: linear(x, kernel, out_dtype=jnp.float32).sum())(x)
    assert grad.dtype == x.dtype


def test_a_scan_has_the_bits_of_a_loop_and_vmap_agrees():
    xs, kernel = _draw(0, (3, 4, 8)), _draw(1, (8, 8))

    def step(x, y):
        return jnp.tanh(linear(x, kernel) + y), None

    def loop(xs):
        x = jnp.zeros((4, 8))
        for y in xs:
            x, _ = step(x, y)
        return x

    scanned = jax.jit(lambda xs: jax.lax.scan(step, jnp.zeros((4, 8)), xs)[0])(xs)
    np.testing.assert_array_equal(scanned, jax.jit(loop)(xs))
    batched = jax.vmap(linear, in_axes=(0, None))(xs, kernel)
    assert _norm_error(batched, linear(xs, kernel)) < 1e-6


@pytest.mark.parametrize(
    ("x", "kernel", "bias"),
    [((2, 3), (4, 5), None), ((2, 3), (3, 4, 5), None), ((2, 3), (3, 4), (3,)), ((), (3, 4), None)],
)
def test_wrong_shapes_are_named(x, kernel, bias):
    with pytest.raises(ShapeError, match="linear got") as error:
        linear(jnp.zeros(x), jnp.zeros(kernel), None if bias is None else jnp.zeros(bias))
    assert str(kernel) in str(error.value)


@pytest.mark.parametrize("biases", [[], [jnp.zeros(3)]])
def test_layers_want_a_bias_each_or_none_at_all(biases):
    with pytest.raises(ShapeError, match=f"2 kernels and {len(biases)} biases"):
        linears(jnp.ones((5, 2)), [jnp.ones((2, 3))] * 2, biases)
