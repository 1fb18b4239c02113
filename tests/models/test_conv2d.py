import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.test_util import check_grads

from fnml.core import ConfigError, ShapeError
from fnml.models import conv2d


def _textbook(x, kernel, stride, padding):
    """Convolve in float64, one output position at a time."""
    height, width, _, features = kernel.shape
    pads = [(0, 0)] * 2
    if padding == "SAME":
        pads = []
        for size, window in zip(x.shape[1:3], (height, width), strict=True):
            total = max((int(np.ceil(size / stride)) - 1) * stride + window - size, 0)
            pads.append((total // 2, total - total // 2))
    x = np.pad(x, ((0, 0), *pads, (0, 0)))
    rows, cols = (x.shape[1] - height) // stride + 1, (x.shape[2] - width) // stride + 1
    out = np.zeros((x.shape[0], rows, cols, features))
    for i in range(rows):
        for j in range(cols):
            patch = x[:, i * stride : i * stride + height, j * stride : j * stride + width]
            out[:, i, j] = np.tensordot(patch, kernel, 3)
    return out


def _relative(got, expected):
    expected = np.asarray(expected, np.float64)
    return np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    size=st.tuples(st.integers(3, 7), st.integers(3, 7)),
    window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    padding=st.sampled_from(["SAME", "VALID"]),
    form=st.sampled_from(["auto", "im2col", "shifted", "xla"]),
    seed=st.integers(0, 99),
)
def test_any_shape_equals_the_textbook(batch, size, window, channels, stride, padding, form, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, *size, channels[0])).astype(np.float32)
    kernel = rng.normal(size=(*window, *channels)).astype(np.float32)
    got = conv2d(jnp.asarray(x), jnp.asarray(kernel), stride=stride, padding=padding, form=form)
    want = _textbook(x.astype(np.float64), kernel.astype(np.float64), stride, padding)
    assert got.shape == want.shape
    # Sums of at most 27 float32 terms.
    assert _relative(got, want) < 2e-6


FORMS = [
    ("auto", 1, "SAME"),
    ("auto", 2, "SAME"),
    ("im2col", 2, "VALID"),
    ("winograd", 1, "SAME"),
    ("winograd", 1, "VALID"),
    ("shifted", 2, "SAME"),
]


@pytest.mark.parametrize(("form", "stride", "padding"), FORMS)
@pytest.mark.parametrize("size", [(6, 5), (9, 4)], ids=str)
def test_value_and_gradients_equal_those_of_the_xla_convolution_in_float64(
    form, stride, padding, size
):
    keys = jax.random.split(jax.random.key(0), 2)
    with jax.enable_x64(True):
        x = jax.random.normal(keys[0], (2, *size, 2), jnp.float64)
        kernel = jax.random.normal(keys[1], (3, 3, 2, 3), jnp.float64)

        def loss(form):
            def run(x, kernel):
                return jnp.sin(conv2d(x, kernel, stride=stride, padding=padding, form=form)).sum()

            return jax.jit(jax.value_and_grad(run, (0, 1)))

        got, want = loss(form)(x, kernel), loss("xla")(x, kernel)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), got, want
        )


@pytest.mark.parametrize(
    ("form", "modes"), [("shifted", ["fwd", "rev"]), ("xla", ["fwd", "rev"]), ("winograd", ["rev"])]
)
def test_gradients_equal_differences_twice_over(form, modes):
    keys = jax.random.split(jax.random.key(0), 2)
    with jax.enable_x64(True):
        x = jax.random.normal(keys[0], (1, 5, 4, 2), jnp.float64)
        kernel = jax.random.normal(keys[1], (3, 3, 2, 2), jnp.float64)

        @jax.jit
        def run(x, kernel):
            return jnp.sin(conv2d(x, kernel, form=form)).sum()

        if form == "winograd":
            check_grads(jax.grad(run, (0, 1)), (x, kernel), order=1, modes=modes)
        else:
            check_grads(run, (x, kernel), order=1, modes=modes)


@pytest.mark.parametrize("size", [4, 7, 16])
def test_winograd_rounds_little_more_than_a_plain_sum(size):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, size, size, 32)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 32, 16)).astype(np.float32)
    grad = rng.normal(size=(2, size, size, 16)).astype(np.float32)

    def results(x, kernel, grad, form):
        out, vjp = jax.vjp(lambda *args: conv2d(*args, form=form), x, kernel)
        return out, *vjp(grad)

    with jax.enable_x64(True):
        wide = (np.asarray(a, np.float64) for a in (x, kernel, grad))
        exact = jax.jit(results, static_argnums=3)(*wide, "xla")
    got = jax.jit(results, static_argnums=3)(x, kernel, grad, "winograd")
    # float32 sums of 288 terms are about 3e-7 off; the transform's numbers are up to 8 times larger.
    assert all(_relative(a, b) < 3e-6 for a, b in zip(got, exact, strict=True))


@pytest.mark.parametrize("stride", [1, 2])
def test_every_form_lowers_to_xla_s_convolution_on_accelerators_and_to_none_on_a_cpu(stride):
    x, kernel = jnp.ones((2, 8, 8, 16)), jnp.ones((3, 3, 16, 16))

    def step(x, kernel):
        return jax.grad(lambda x, k: jnp.sin(conv2d(x, k, stride=stride)).sum(), (0, 1))(x, kernel)

    def text(platform):
        return jax.jit(step).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()

    for platform in ("cuda", "tpu"):
        # The forward pass and two gradients, and none of the CPU's matrix products.
        assert text(platform).count("stablehlo.convolution") == 3
        assert "dot_general" not in text(platform)
    assert "stablehlo.convolution" not in text("cpu")
    assert "dot_general" in text("cpu")


def _xla(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _scan_and_loop(convolution):
    """Run value and gradients over three batches, inside ``lax.scan`` and one call each."""
    keys = jax.random.split(jax.random.key(1), 2)
    xs = jax.random.normal(keys[0], (3, 8, 14, 14, 16))
    kernel = jax.random.normal(keys[1], (3, 3, 16, 16))

    def one(kernel, x):
        out, vjp = jax.vjp(lambda kernel, x: convolution(jnp.tanh(x), kernel), kernel, x)
        return out, vjp(jnp.cos(out))

    scanned = jax.jit(lambda kernel, xs: lax.scan(lambda k, x: (k, one(k, x)), kernel, xs)[1])
    looped = [jax.jit(one)(kernel, x) for x in xs]
    return scanned(kernel, xs), jax.tree.map(lambda *parts: np.stack(parts), *looped)


@pytest.mark.parametrize(
    "convolution",
    [conv2d, functools.partial(conv2d, form="im2col"), functools.partial(conv2d, stride=2)],
    ids=["winograd", "im2col", "stride 2"],
)
def test_a_scan_has_the_bits_of_a_loop_value_and_gradients(convolution):
    jax.tree.map(np.testing.assert_array_equal, *_scan_and_loop(convolution))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a property of XLA on a CPU")
def test_the_check_on_bits_sees_what_xla_s_own_convolution_does():
    # The reason for conv2d's form. If this fails, XLA has changed: measure the forms again.
    scanned, looped = _scan_and_loop(_xla)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), scanned, looped)
    assert not all(jax.tree.leaves(same))


def test_bfloat16_sums_in_float32():
    keys = jax.random.split(jax.random.key(2), 2)
    x = jax.random.normal(keys[0], (1, 5, 5, 16)).astype(jnp.bfloat16)
    kernel = jax.random.normal(keys[1], (3, 3, 16, 4)).astype(jnp.bfloat16)
    got = conv2d(x, kernel)
    exact = _textbook(np.asarray(x, np.float64), np.asarray(kernel, np.float64), 1, "SAME")
    assert got.dtype == jnp.bfloat16
    # One rounding of the result: at most 2**-9 relative, 2**-9 / sqrt(3) in the mean.
    assert _relative(got, exact) < 2**-9


@pytest.mark.parametrize(
    ("x", "kernel", "options", "error"),
    [
        ((1, 4, 4, 2), (3, 3, 3, 1), {}, ShapeError),
        ((4, 4, 2), (3, 3, 2, 1), {}, ShapeError),
        ((1, 2, 4, 2), (3, 3, 2, 1), {"padding": "VALID"}, ShapeError),
        ((1, 4, 4, 2), (3, 3, 2, 1), {"stride": 0}, ConfigError),
        ((1, 4, 4, 2), (3, 3, 2, 1), {"padding": "same"}, ConfigError),
        ((1, 4, 4, 2), (3, 3, 2, 1), {"form": "winogard"}, ConfigError),
        ((1, 4, 4, 2), (3, 3, 2, 1), {"form": "winograd", "stride": 2}, ConfigError),
        ((1, 4, 4, 2), (1, 1, 2, 1), {"form": "winograd"}, ConfigError),
    ],
)
def test_what_does_not_fit_is_refused(x, kernel, options, error):
    with pytest.raises(error, match=r"expected|fit"):
        conv2d(jnp.zeros(x), jnp.zeros(kernel), **options)
