"""rms_norm and layer_norm: one test body for both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_cases import TOLERANCE, distance, races, strict_cuda, strict_tpu

from fnml.pallas_kernels import layer_norm, rms_norm
from fnml.pallas_kernels.layer_norm import _gpu as layer_norm_gpu
from fnml.pallas_kernels.layer_norm import _tpu as layer_norm_tpu
from fnml.pallas_kernels.rms_norm import _gpu as rms_norm_gpu
from fnml.pallas_kernels.rms_norm import _tpu as rms_norm_tpu
from fnml.pallas_kernels.rms_norm._blocks import RowBlocks

NORMS = {"rms_norm": rms_norm, "layer_norm": layer_norm}
BODIES = {
    "reference": {"implementation": "reference"},
    "lax": {"implementation": "lax"},
    "tpu": {"implementation": "pallas", "interpret": "tpu"},
    "cuda": {"implementation": "pallas", "interpret": "cuda"},
}
GPU_BODIES = {"rms_norm": rms_norm_gpu, "layer_norm": layer_norm_gpu}


def _draw(shape, dtype="float32", seed=0, bias=True):
    """Return x, scale, bias, residual, and the gradients of the two results."""
    random = np.random.default_rng(seed)
    x, residual, grad, more = (random.normal(size=shape) + 0.5 for _ in range(4))
    scale, shift = random.normal(size=(2, shape[-1]))
    arrays = [jnp.asarray(a, dtype) for a in (x, scale, shift, residual, grad, more)]
    return arrays if bias else [*arrays[:2], None, *arrays[3:]]


def _textbook(name, x, scale, bias, residual, grad, more, eps):
    """Results and gradients in float64 NumPy, by the formulas of the papers."""
    x, scale, bias, residual, grad, more = (
        None if a is None else np.asarray(a).astype(np.float64)
        for a in (x, scale, bias, residual, grad, more)
    )
    total = x if residual is None else x + residual
    mean = total.mean(-1, keepdims=True) if name == "layer_norm" else 0.0
    deviation = np.sqrt(((total - mean) ** 2).mean(-1, keepdims=True) + eps)
    unit = (total - mean) / deviation
    inner = grad * scale
    slope = inner - unit * (inner * unit).mean(-1, keepdims=True)
    if name == "layer_norm":
        slope = slope - inner.mean(-1, keepdims=True)
    slope = slope / deviation + (0 if residual is None else more)
    rows = tuple(range(x.ndim - 1))
    out = unit * scale + (0 if bias is None else bias)
    vectors = [(grad * unit).sum(rows)] + ([] if bias is None else [grad.sum(rows)])
    return [out] if residual is None else [out, total], [slope, *vectors]


def _computed(name, x, scale, bias, residual, grad, more, eps, **options):
    """Results, and the gradients of x, the scale and the bias."""

    def norm(x, scale, bias):
        middle = (bias,) if name == "layer_norm" else ()
        return NORMS[name](x, scale, *middle, residual, eps=eps, **options)

    @jax.jit
    def run(x, scale, bias):
        out, vjp = jax.vjp(norm, x, scale, bias)
        return out, vjp(grad if residual is None else (grad, more))

    out, grads = run(x, scale, bias)
    return jax.tree.leaves(out), [g for g in grads if g is not None]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fused", [False, True])
def test_results_and_gradients_equal_float64(name, body, dtype, fused):
    # Whole lanes are all that the GPU's body takes.
    shape = (3, 5, 256 if body == "cuda" else 100)
    x, scale, bias, residual, grad, more = _draw(shape, dtype, bias=name == "layer_norm")
    arrays = (x, scale, bias, residual if fused else None, grad, more)
    got = _computed(name, *arrays, 1e-5, **BODIES[body])
    want = _textbook(name, *arrays, 1e-5)
    assert distance(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", NORMS)
def test_many_tiles_add_to_one_gradient_of_the_scale(name):
    # 1,024 rows of 128 are a tile, so the second one has six rows and 1,018 of nothing.
    arrays = _draw((1030, 128), bias=name == "layer_norm")
    got = _computed(name, *arrays, 1e-6, **BODIES["tpu"])
    assert distance(got, _textbook(name, *arrays, 1e-6)) < TOLERANCE["float32"]


@settings(max_examples=3)
@given(rows=st.integers(1, 40), width=st.integers(1, 140), seed=st.integers(0, 9))
@pytest.mark.parametrize("name", NORMS)
def test_odd_shapes(name, rows, width, seed):
    # Tiles of eight rows: no, one or several whole tiles, and any remainder.
    module = {"rms_norm": rms_norm_tpu, "layer_norm": layer_norm_tpu}[name]
    x, scale, bias, residual, grad, more = _draw((rows, width), seed=seed)
    options = {"rows": min(8, rows), "interpret": True}
    middle = (bias,) if name == "layer_norm" else ()
    out = module.forward(x, scale, *middle, residual, 1e-3, **options)
    grads = module.backward(out[1], scale, *middle, grad, more, 1e-3, **options)
    given_bias = bias if middle else None
    want = _textbook(name, x, scale, given_bias, residual, grad, more, 1e-3)
    assert distance((list(out), list(grads)), want) < 5e-6


@pytest.mark.parametrize("name", NORMS)
def test_no_races_and_no_reads_out_of_bounds(name):
    module = {"rms_norm": rms_norm_tpu, "layer_norm": layer_norm_tpu}[name]
    x, scale, bias, residual, grad, more = _draw((19, 64))
    options = {"rows": 8, "interpret": strict_tpu()}
    middle = (bias,) if name == "layer_norm" else ()
    out = module.forward(x, scale, *middle, residual, 1e-6, **options)
    assert not races()
    grads = module.backward(out[1], scale, *middle, grad, more, 1e-6, **options)
    assert not races()
    want = _textbook(name, x, scale, bias if middle else None, residual, grad, more, 1e-6)
    assert distance((list(out), list(grads)), want) < TOLERANCE["float32"]


@pytest.mark.parametrize("name", NORMS)
def test_float16_on_a_gpu(name):
    arrays = _draw((3, 256), "float16", bias=name == "layer_norm")
    got = _computed(name, *arrays, 1e-5, **BODIES["cuda"])
    assert distance(got, _textbook(name, *arrays, 1e-5)) < TOLERANCE["float16"]


@settings(max_examples=2)
@example(rows=5, lanes=1, parts=2, blocks=2, seed=0)  # a block with one row less, wide rows
@given(
    rows=st.integers(1, 5),
    lanes=st.integers(1, 2),
    parts=st.integers(1, 2),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 9),
)
@pytest.mark.parametrize("name", NORMS)
def test_a_gpu_divides_rows_without_races(name, rows, lanes, parts, blocks, seed):
    x, scale, bias, residual, grad, more = _draw((rows, 256 * lanes * parts), seed=seed)
    options = {"cut": RowBlocks(blocks, 256 * lanes), "interpret": strict_cuda()}
    middle = (bias,) if name == "layer_norm" else ()
    out = GPU_BODIES[name].forward(x, scale, *middle, residual, 1e-3, **options)
    assert not races("cuda")
    grads = GPU_BODIES[name].backward(out[1], scale, *middle, grad, more, 1e-3, **options)
    assert not races("cuda")
    given_bias = bias if middle else None
    want = _textbook(name, x, scale, given_bias, residual, grad, more, 1e-3)
    assert distance((list(out), list(grads)), want) < 5e-6


@pytest.mark.parametrize("name", NORMS)
def test_the_fused_sum_changes_no_bit(name):
    x, scale, _, residual, *_ = _draw((40, 64))
    y, total = NORMS[name](x, scale, residual=residual)
    np.testing.assert_array_equal(total, x + residual)
    np.testing.assert_array_equal(y, NORMS[name](x + residual, scale))


@pytest.mark.parametrize("name", NORMS)
def test_large_inputs_keep_second_derivatives_and_small_ones_forward_mode(name):
    large = jax.ShapeDtypeStruct((8192, 1024), jnp.float32)

    def once(x):
        return jax.grad(lambda x: jnp.sum(NORMS[name](x, jnp.ones(1024)) ** 3))(x)

    def twice(x):
        return jax.grad(lambda x: jnp.sum(once(x) ** 2))(x)

    assert "platform_index" in str(jax.make_jaxpr(once)(large))
    assert jax.eval_shape(twice, large).shape == large.shape
    x, scale, *_ = _draw((4, 8))
    jaxpr = jax.make_jaxpr(NORMS[name])(x, scale)
    assert "platform_index" not in str(jaxpr)
    tangent = jax.jvp(lambda x: NORMS[name](x, scale), (x,), (jnp.ones_like(x),))[1]
    step = 1e-3
    plus, minus = (NORMS[name](x + s, scale) for s in (step, -step))
    np.testing.assert_allclose(tangent, (plus - minus) / (2 * step), atol=2e-3)


def test_misuse_is_refused_with_every_fault():
    x = jnp.ones((2, 4))
    with pytest.raises(ValueError, match=r"scale has shape \(3,\), expected \(4,\).*; residual is"):
        rms_norm(x, jnp.ones(3), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"scale has shape \(3,\).*; bias has shape \(2,\)"):
        layer_norm(x, jnp.ones(3), jnp.ones(2))
    with pytest.raises(ValueError, match="x is int32"):
        rms_norm(jnp.ones(4, jnp.int32), jnp.ones(4))
    with pytest.raises(NotImplementedError, match=r"at most 32768 numbers.* up to 16384"):
        layer_norm(jnp.ones((1, 40_000)), jnp.ones(40_000), implementation="pallas")
    with pytest.raises(NotImplementedError, match=r"cuda: x is .*a multiple of 256 numbers"):
        rms_norm(jnp.ones((2, 384)), jnp.ones(384), implementation="pallas", interpret="cuda")
