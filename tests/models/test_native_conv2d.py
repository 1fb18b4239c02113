"""Convolution in C++: value and gradients, which calls it takes, one result for any threads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fewer_threads import printed_with_one_and_two
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.test_util import check_grads

from fnml.models import conv2d
from fnml.pallas_kernels import native_faults, native_kernels

pytestmark = pytest.mark.skipif(bool(native_faults()), reason="; ".join(native_faults()))

EPSILON = float(np.finfo(np.float32).eps)


def _pads(size, window, stride, padding):
    if padding == "VALID":
        return 0, 0
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


def _textbook(x, kernel, grad, stride, padding):
    """Value and gradients in float64, one output position at a time, from the definition."""
    height, width = kernel.shape[:2]
    pads = [
        _pads(size, window, stride, padding)
        for size, window in zip(x.shape[1:3], (height, width), strict=True)
    ]
    wide = np.pad(x, ((0, 0), *pads, (0, 0)))
    out, grad_wide, grad_kernel = np.zeros_like(grad), np.zeros_like(wide), np.zeros_like(kernel)
    for i in range(grad.shape[1]):
        for j in range(grad.shape[2]):
            at = np.s_[:, i * stride : i * stride + height, j * stride : j * stride + width]
            out[:, i, j] = np.tensordot(wide[at], kernel, 3)
            grad_wide[at] += np.tensordot(grad[:, i, j], kernel, ((1,), (3,)))
            grad_kernel += np.tensordot(wide[at], grad[:, i, j], ((0,), (0,)))
    (top, _), (left, _) = pads
    return out, grad_wide[:, top:, left:][:, : x.shape[1], : x.shape[2]], grad_kernel


def _draw(batch, size, window, channels, stride, padding, seed=0):
    rng = np.random.default_rng(seed)
    out = [
        (n + sum(_pads(n, k, stride, padding)) - k) // stride + 1
        for n, k in zip(size, window, strict=True)
    ]
    shapes = (batch, *size, channels[0]), (*window, *channels), (batch, *out, channels[1])
    return [rng.normal(size=shape) for shape in shapes]


def _with_gradients(x, kernel, grad, **options):
    out, back = jax.vjp(lambda *args: conv2d(*args, **options), x, kernel)
    return out, *back(grad)


def _native(x, kernel, grad, stride, padding):
    with native_kernels():
        arrays = (jnp.asarray(a, jnp.float32) for a in (x, kernel, grad))
        return _with_gradients(*arrays, stride=stride, padding=padding)


def _assert_near(got, x, kernel, grad, stride, padding):
    """Compare with float64, bounded by the sums of the products' sizes.

    A float32 sum of n products is off by at most n roundings of the sum of their sizes, and by
    about their root. Winograd's sums are off by a few times that: its numbers are up to 8 times
    as large, so 8 roundings of that sum are allowed for any n here (below 10,000).
    """
    exact = _textbook(x, kernel, grad, stride, padding)
    sizes = _textbook(*(np.abs(a) for a in (x, kernel, grad)), stride, padding)
    for a, b, size in zip(got, exact, sizes, strict=True):
        assert a.shape == b.shape
        # Where nothing is multiplied the result is exactly 0. The mean belongs to the bound: a
        # strip's rows are mixed, so a small result has the rounding of its large neighbours.
        bound = 8 * EPSILON * (size + size.mean())
        np.testing.assert_array_less(np.abs(np.asarray(a, np.float64) - b), bound + 1e-30)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(3, 14), st.integers(3, 9)),
    # Often what Winograd's form takes: three rows and stride 1.
    window=st.tuples(st.sampled_from([3, 3, 3, 2, 1]), st.integers(1, 3)),
    channels=st.tuples(st.integers(1, 19), st.integers(1, 70)),
    stride=st.sampled_from([1, 1, 2, 3]),
    padding=st.sampled_from(["SAME", "VALID"]),
    seed=st.integers(0, 99),
)
def test_any_shape_equals_the_definition(batch, size, window, channels, stride, padding, seed):
    arrays = _draw(batch, size, window, channels, stride, padding, seed)
    _assert_near(_native(*arrays, stride, padding), *arrays, stride, padding)


@pytest.mark.parametrize(
    ("batch", "size", "window", "channels", "stride"),
    [
        pytest.param(3, (32, 32), (3, 3), (20, 64), 1, id="parts of the kernel's gradient"),
        pytest.param(40, (4, 4), (3, 3), (16, 130), 1, id="three panels of features"),
        pytest.param(2, (33, 17), (5, 4), (17, 48), 2, id="several pieces, stride 2"),
        pytest.param(2, (9, 9), (1, 1), (7, 16), 3, id="inputs that nothing sees"),
    ],
)
def test_large_shapes_equal_the_definition(batch, size, window, channels, stride):
    arrays = _draw(batch, size, window, channels, stride, "SAME")
    _assert_near(_native(*arrays, stride, "SAME"), *arrays, stride, "SAME")


@pytest.mark.parametrize("size", [4, 7, 16])
def test_mixed_rows_round_little_more_than_a_plain_sum(size):
    x, kernel, grad = _draw(2, (size, size), (3, 3), (32, 16), 1, "SAME")
    arrays = [np.asarray(a, np.float32).astype(np.float64) for a in (x, kernel, grad)]
    got = _native(*arrays, 1, "SAME")
    for a, b in zip(got, _textbook(*arrays, 1, "SAME"), strict=True):
        # The bound of the lax form. Measured: below 1e-6; sums of up to 512 terms are 3e-7 off.
        assert np.linalg.norm(np.asarray(a, np.float64) - b) < 3e-6 * np.linalg.norm(b)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_scan_has_the_bits_of_a_loop(stride):
    keys = jax.random.split(jax.random.key(1), 2)
    xs = jax.random.normal(keys[0], (3, 4, 10, 9, 16))
    kernel = jax.random.normal(keys[1], (3, 3, 16, 24))

    def one(kernel, x):
        out, back = jax.vjp(lambda *args: conv2d(*args, stride=stride), jnp.tanh(x), kernel)
        return out, back(jnp.cos(out))

    with native_kernels():
        scanned = jax.jit(lambda kernel, xs: lax.scan(lambda k, x: (k, one(k, x)), kernel, xs)[1])
        looped = [jax.jit(one)(kernel, x) for x in xs]
        jax.tree.map(
            np.testing.assert_array_equal,
            scanned(kernel, xs),
            jax.tree.map(lambda *parts: np.stack(parts), *looped),
        )


def test_vmapped_calls_take_the_other_form():
    x = jax.random.normal(jax.random.key(0), (2, 3, 8, 8, 4))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 4, 8))
    grad = jax.random.normal(jax.random.key(2), (2, 3, 8, 8, 8))

    def run(x, kernel, grad):
        return jax.vmap(_with_gradients, (0, None, 0))(x, kernel, grad)

    plain = jax.jit(run)(x, kernel, grad)
    with native_kernels():
        run = jax.jit(lambda *args: jax.vmap(_with_gradients, (0, None, 0))(*args))
        assert "fnml_conv2d" not in run.lower(x, kernel, grad).as_text()
        jax.tree.map(np.testing.assert_array_equal, run(x, kernel, grad), plain)


def test_second_derivatives_are_those_of_the_other_form():
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (1, 5, 4, 2))
    kernel = jax.random.normal(keys[1], (3, 3, 2, 2)) / 3

    def loss(x, kernel):
        return jnp.sin(conv2d(x, kernel)).sum()

    with native_kernels():
        check_grads(jax.grad(loss, (0, 1)), (x, kernel), order=1, modes=["rev"], rtol=2e-2)


def _program(x, kernel, **options):
    return str(jax.make_jaxpr(lambda *args: conv2d(*args, **options))(x, kernel))


def test_only_the_scope_changes_the_program_and_only_for_float32_on_one_device():
    x, kernel = jnp.ones((1, 8, 8, 2)), jnp.ones((3, 3, 2, 2))
    outside = _program(x, kernel)
    halves = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    plain_halves, plain_form = _program(*halves), _program(x, kernel, form="im2col")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with native_kernels():
        inside = _program(x, kernel)
        assert _program(*halves) == plain_halves
        assert _program(x, kernel, form="im2col") == plain_form
        with jax.set_mesh(mesh):
            divided = _program(x, kernel)
    assert "ffi_call" in inside
    assert "ffi_call" not in outside + plain_halves + plain_form + divided
    assert _program(x, kernel) == outside


@pytest.mark.parametrize("stride", [1, 2])
def test_accelerators_keep_xla_s_convolution(stride):
    x, kernel = jnp.ones((2, 8, 8, 16)), jnp.ones((3, 3, 16, 16))

    def step(x, kernel):
        return jax.grad(lambda x, k: jnp.sin(conv2d(x, k, stride=stride)).sum(), (0, 1))(x, kernel)

    with native_kernels():
        traced = jax.jit(step).trace(x, kernel)
        for platform in ("cuda", "tpu"):
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            assert text.count("stablehlo.convolution") == 3 and "fnml_conv2d" not in text
        text = traced.lower(lowering_platforms=("cpu",)).as_text()
        assert "stablehlo.convolution" not in text and "fnml_conv2d_kernel_gradient" in text


SCRIPT = """
import hashlib, jax, jax.numpy as jnp, numpy as np
from fnml.models import conv2d
from fnml.pallas_kernels import native_kernels

digest = hashlib.sha256()
with native_kernels():
    for shape, features, window, stride in (
        ((6, 32, 32, 20), 70, 3, 1), ((6, 32, 32, 20), 70, 3, 2), ((2, 9, 9, 3), 5, 2, 1)
    ):
        x = jax.random.normal(jax.random.key(0), shape)
        kernel = jax.random.normal(jax.random.key(1), (window, window, shape[3], features))
        def run(x, kernel):
            out, back = jax.vjp(lambda *args: conv2d(*args, stride=stride), x, kernel)
            return out, back(jnp.cos(out))
        for array in jax.tree.leaves(jax.jit(run)(x, kernel)):
            digest.update(np.asarray(array).tobytes())
print(digest.hexdigest())
"""


def test_any_number_of_threads_gives_the_same_bits():
    one, two = printed_with_one_and_two(SCRIPT)
    assert one == two and len(one) == 64
