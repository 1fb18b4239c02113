"""Batch normalisation with ReLU in C++: value and gradients, and when it is taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fewer_threads import printed_with_one_and_two
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from fnml.core import ShapeError
from fnml.models import batch_norm
from fnml.models._batch_norm_relu import batch_norm_relu
from fnml.pallas_kernels import native_faults, native_kernels

pytestmark = pytest.mark.skipif(bool(native_faults()), reason="; ".join(native_faults()))


def _draw(shape, added, seed=0):
    """Return x, the scale, the bias, what is added, and a gradient of the result, in float64."""
    rng = np.random.default_rng(seed)
    # A mean of thrice the deviation: a variance as E[x^2] - E[x]^2 would already cancel.
    x, residual, grad = rng.normal(size=(3, *shape)) + np.array([3.0, 0, 0]).reshape(
        3, *[1] * len(shape)
    )
    scale, bias = rng.normal(size=(2, shape[-1]))
    return x, scale, bias, *([residual] if added else []), grad


def _textbook(x, scale, bias, *rest, eps=1e-5):
    """Value, statistics and gradients in float64, from the paper's formulas."""
    *residual, grad = rest
    axes = tuple(range(x.ndim - 1))
    mean, variance = x.mean(axes), x.var(axes)
    unit = (x - mean) / np.sqrt(variance + eps)
    before = unit * scale + bias + sum(residual)
    slope = grad * (before > 0)
    to_x = slope - slope.mean(axes) - unit * (slope * unit).mean(axes)
    grads = [to_x * scale / np.sqrt(variance + eps), (slope * unit).sum(axes), slope.sum(axes)]
    return [np.maximum(before, 0), mean, variance + mean**2, *grads, *([slope] * len(residual))]


def _run(x, scale, bias, *rest, **options):
    *residual, grad = rest

    def function(x, scale, bias, *residual):
        return batch_norm_relu(
            x, scale, bias, state=None, train=True, residual=(*residual, None)[0], **options
        )

    out, back, stats = jax.vjp(function, x, scale, bias, *residual, has_aux=True)
    return [out, stats["mean"].value, stats["square"].value, *back(grad)]


def _floats(arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(2, 9), st.integers(2, 9), st.integers(1, 70)),
    added=st.booleans(),
    eps=st.sampled_from([1e-5, 0.1]),
    seed=st.integers(0, 99),
)
def test_any_shape_equals_the_definition(shape, added, eps, seed):
    arrays = [np.asarray(x, np.float32).astype(np.float64) for x in _draw(shape, added, seed)]
    with native_kernels():
        got = _run(*_floats(arrays), eps=eps)
    for a, b in zip(got, _textbook(*arrays, eps=eps), strict=True):
        # Roundings are relative to the numbers that come in, here of size 1 to 5; where few rows
        # almost agree, they are divided by a deviation of at least eps ** 0.5.
        size = max(np.linalg.norm(b), b.size**0.5)
        assert np.linalg.norm(np.asarray(a, np.float64) - b) < 2e-5 * size


@pytest.mark.parametrize("added", [False, True])
def test_many_rows_equal_the_definition(added):
    arrays = [np.asarray(x, np.float32).astype(np.float64) for x in _draw((9, 25, 25, 40), added)]
    with native_kernels():
        got = _run(*_floats(arrays))
    for a, b in zip(got, _textbook(*arrays), strict=True):
        # Measured: below 5e-7.
        assert np.linalg.norm(np.asarray(a, np.float64) - b) < 2e-6 * np.linalg.norm(b)


@pytest.mark.parametrize("width", [1, 15, 17])
def test_a_scale_of_another_width_is_refused_as_outside_the_scope(width):
    x, scale = jnp.ones((4, 16)), jnp.ones(width)
    with native_kernels(), pytest.raises(ShapeError):
        batch_norm_relu(x, scale, scale, state=None, train=True)


def test_a_nan_stays():
    x, scale, bias, grad = _floats(_draw((2, 3, 3, 5), False))
    with native_kernels():
        out, *_ = _run(x.at[0, 0, 0, 1].set(jnp.nan), scale, bias, grad)
    assert np.isnan(out[..., 1]).all() and np.isfinite(np.delete(out, 1, -1)).all()


@pytest.mark.parametrize("added", [False, True])
def test_vmapped_calls_take_the_other_form(added):
    arrays = [jnp.stack([x, x]) for x in _floats(_draw((2, 3, 3, 5), added))]
    plain = jax.vmap(_run)(*arrays)
    with native_kernels():
        run = jax.jit(lambda *args: jax.vmap(_run)(*args))
        assert "fnml_batch_norm" not in run.lower(*arrays).as_text()
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            run(*arrays),
            plain,
        )


def _program(x, train, **options):
    scale, bias = jnp.ones((2, 5), x.dtype)
    state = {"mean": jnp.zeros(5), "square": jnp.ones(5)}

    def function(x):
        return batch_norm_relu(x, scale, bias, state=state, train=train, **options)[0]

    return str(jax.make_jaxpr(function)(x))


def test_only_the_scope_changes_the_program_and_only_training_in_float32():
    x = jnp.ones((2, 3, 3, 5))
    outside = _program(x, True)
    with native_kernels():
        assert "ffi_call" in _program(x, True)
        assert "ffi_call" not in _program(x, False)
        assert "ffi_call" not in _program(x.astype(jnp.bfloat16), True)
    assert _program(x, True) == outside and "ffi_call" not in outside


def test_outside_the_scope_it_is_batch_norm_a_sum_and_relu():
    x, scale, bias, residual, _ = _floats(_draw((2, 3, 3, 5), True))
    got, stats = batch_norm_relu(x, scale, bias, state=None, train=True, residual=residual)
    want, want_stats = batch_norm(x, scale, bias, state=None, train=True)
    np.testing.assert_array_equal(got, jax.nn.relu(residual + want))
    jax.tree.map(np.testing.assert_array_equal, stats, want_stats)


def test_a_scan_has_the_bits_of_a_loop():
    xs = jax.random.normal(jax.random.key(0), (3, 4, 5, 5, 20))
    _, scale, bias, grad = _floats(_draw(xs.shape[1:], False))

    def one(x):
        return _run(jnp.tanh(x), scale, bias, grad)

    with native_kernels():
        scanned = jax.jit(lambda xs: lax.scan(lambda _, x: (None, one(x)), None, xs)[1])(xs)
        looped = [jax.jit(one)(x) for x in xs]
    for a, *parts in zip(scanned, *looped, strict=True):
        np.testing.assert_array_equal(a, np.stack(parts))


SCRIPT = """
import hashlib, jax, jax.numpy as jnp, numpy as np
from fnml.models._batch_norm_relu import batch_norm_relu
from fnml.pallas_kernels import native_kernels

x = jax.random.normal(jax.random.key(0), (5, 31, 29, 70)) + 2
scale, bias = jax.random.normal(jax.random.key(1), (2, 70))
digest = hashlib.sha256()
with native_kernels():
    def run(*arrays):
        function = lambda x, scale, bias: batch_norm_relu(
            x, scale, bias, state=None, train=True, residual=x
        )
        out, back, stats = jax.vjp(function, *arrays, has_aux=True)
        return out, stats, back(out)
    for array in jax.tree.leaves(jax.jit(run)(x, scale, bias)):
        digest.update(np.asarray(array).tobytes())
print(digest.hexdigest())
"""


def test_any_number_of_threads_gives_the_same_bits():
    one, two = printed_with_one_and_two(SCRIPT)
    assert one == two and len(one) == 64
