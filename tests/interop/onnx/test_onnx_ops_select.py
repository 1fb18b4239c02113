import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads
from one_op import in_importer, in_onnxruntime, one_op, same

from fnml.core import ShapeError
from fnml.interop.onnx import from_onnx

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 4, 5)).astype(np.float32)
# Few values, so that many are equal.
TIES = RNG.integers(0, 3, size=(3, 4, 5)).astype(np.float32)


def ints(*values):
    return np.array(values, np.int64)


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("last", [0, 1])
def test_the_first_or_last_of_equals_is_chosen_as_in_onnxruntime(last, op):
    for axis, keep in ((1, 0), (-1, 1)):
        same(op, [TIES], [np.int64], 13, axis=axis, keepdims=keep, select_last_index=last)


@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint8])
def test_top_k_equals_onnxruntime(dtype, largest):
    # onnxruntime takes no uint8: widened there, it has the same order.
    x = (TIES * 100).astype(dtype)
    if dtype == np.uint8:
        model = one_op("TopK", [x, ints(3)], [dtype, np.int64], 11, axis=1, largest=largest)
        values, indices = in_importer(model, [x, ints(3)])
        wide = x.astype(np.int32)
        model = one_op("TopK", [wide, ints(3)], [np.int32, np.int64], 11, axis=1, largest=largest)
        expected = in_onnxruntime(model, [wide, ints(3)])
        np.testing.assert_array_equal(values, expected[0])
        np.testing.assert_array_equal(indices, expected[1])
    else:
        same("TopK", [x, ints(3)], [dtype, np.int64], 11, axis=1, largest=largest)


def test_top_k_sends_its_gradient_to_what_it_chose():
    imported, params = from_onnx(one_op("TopK", [X[0, 0], ints(2)], opset=11), {"i1": ints(2)})
    grads = jax.grad(lambda x: imported.apply(params, x).sum())(jnp.asarray(X[0, 0]))
    expected = np.zeros(5)
    expected[np.argsort(X[0, 0])[-2:]] = 1
    np.testing.assert_array_equal(grads, expected)


@given(st.integers(-2, 1), st.integers(0, 2**16))
@settings(max_examples=8)
def test_gather_and_scatter_elements_equal_onnxruntime(axis, seed):
    rng = np.random.default_rng(seed)
    x, updates = X[0], rng.normal(size=(2, 3)).astype(np.float32)
    indices = rng.integers(-x.shape[axis], x.shape[axis], size=(2, 3))
    same("GatherElements", [x, indices], opset=13, axis=axis)
    for reduction in ("add", "mul", "min", "max"):
        same("ScatterElements", [x, indices, updates], opset=18, axis=axis, reduction=reduction)


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "min", "max"])
def test_scatter_nd_equals_onnxruntime(reduction):
    indices = ints(*[[0, 1], [2, -1], [1, 3]])
    updates = RNG.normal(size=(3, 5)).astype(np.float32)
    same("ScatterND", [X, indices, updates], opset=18, reduction=reduction)


@pytest.mark.parametrize(
    ("batch", "indices"),
    [
        (0, [[0, 1], [2, -1]]),
        (0, [[[0], [2]]]),
        (1, [[[0, 4]], [[3, -1]], [[1, 2]]]),
        (1, [[1]] * 3),
    ],
)
def test_gather_nd_equals_onnxruntime(batch, indices):
    same("GatherND", [X, ints(*indices)], opset=13, batch_dims=batch)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("opset", [11, 13])
def test_hardmax_equals_onnxruntime(opset, axis):
    same("Hardmax", [TIES], opset=opset, axis=axis)


@pytest.mark.parametrize("axis", [0, -1, 1])
def test_one_hot_equals_onnxruntime(axis):
    indices, values = ints([0, -1, 2], [3, 4, -5]), np.array([-1.0, 2.5], np.float32)
    same("OneHot", [indices, np.asarray(4), values], opset=11, axis=axis)


def test_reverse_sequence_equals_onnxruntime():
    time_last = X[:, :, 0]
    same("ReverseSequence", [time_last, ints(1, 4, 2)], opset=10, time_axis=1, batch_axis=0)
    swapped = X.swapaxes(0, 1)
    same("ReverseSequence", [swapped, ints(1, 4, 2)], opset=10, time_axis=0, batch_axis=1)


def test_compress_non_zero_and_unique_equal_onnxruntime():
    same("Compress", [X, np.array([True, False, True])], opset=11, axis=1)
    same("Compress", [X, np.arange(60) % 7 == 0], opset=11)
    same("NonZero", [TIES], [np.int64], 13)
    outputs = [np.float32, np.int64, np.int64, np.int64]
    for order in (0, 1):
        same("Unique", [TIES], outputs, 11, sorted=order)
        same("Unique", [TIES[:, :1, :1].repeat(2, 1)], outputs, 11, sorted=order, axis=0)


def test_what_gives_a_shape_is_refused_when_it_is_traced():
    imported, params = from_onnx(one_op("NonZero", [TIES], [np.int64]))
    with pytest.raises(ShapeError, match=r"node 'node' .NonZero.: input 0 .'i0'. decides a shape"):
        jax.jit(imported.apply)(params, TIES)
    # Without jit it is known, and so is the shape.
    np.testing.assert_array_equal(imported.apply(params, TIES), np.stack(np.nonzero(TIES)))


@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("exclusive", [0, 1])
def test_running_sums_and_products_equal_their_definitions(exclusive, reverse):
    options = {"exclusive": exclusive, "reverse": reverse}
    for axis in (1, -1):
        same("CumSum", [X, np.asarray(axis)], opset=14, **options)
        model = one_op("CumProd", [X, np.asarray(axis)], opset=26, **options)
        (got,) = in_importer(model, [X, np.asarray(axis)])
        line = np.moveaxis(X.astype(np.float64), axis, 0)
        line = line[::-1] if reverse else line
        expected = np.cumprod(line, axis=0)
        if exclusive:
            expected = np.concatenate([np.ones_like(line[:1]), expected[:-1]])
        expected = np.moveaxis(expected[::-1] if reverse else expected, 0, axis)
        np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("upper", [0, 1])
def test_triangles_equal_onnxruntime(upper):
    for k in (-2, 0, 3):
        same("Trilu", [X, np.asarray(k)], opset=14, upper=upper)


def test_matrices_equal_onnxruntime():
    square = RNG.normal(size=(2, 3, 3)).astype(np.float32)
    same("Det", [square], opset=11)
    same("EyeLike", [X[0]], [np.int32], 9, k=1, dtype=6)
    same("EyeLike", [X[0]], opset=9, k=-1)
    same("Einsum", [X, square[0, :, :2]], opset=12, equation="abc, ad -> dcb", rtol=1e-4)
    same("Einsum", [square], opset=12, equation="...ii->...i")


@given(hnp.arrays(np.float32, 6, elements=st.sampled_from([0.0, 1.5, np.inf, -np.inf, np.nan])))
@settings(max_examples=5)
def test_infinities_and_nan_equal_onnxruntime(x):
    for positive, negative in ((1, 1), (0, 1), (1, 0)):
        same("IsInf", [x], [bool], 20, detect_positive=positive, detect_negative=negative)
    same("IsNaN", [x], [bool], 20)


@pytest.mark.parametrize("mode", ["linear", "circular"])
def test_tensor_scatter_writes_each_sample_at_its_place(mode):
    cache, update = np.zeros((2, 2, 4, 3), np.float32), RNG.normal(size=(2, 2, 2, 3))
    starts = ints(1, 3 if mode == "circular" else 2)
    inputs = [cache, update.astype(np.float32), starts]
    (got,) = in_importer(one_op("TensorScatter", inputs, opset=24, mode=mode), inputs)
    expected = cache.copy()
    for b, s in np.ndindex(2, 2):
        expected[b, :, (starts[b] + s) % 4] = inputs[1][b, :, s]
    np.testing.assert_array_equal(got, expected)


def test_gradients_of_scatter_and_running_products():
    with jax.enable_x64(True):
        x, updates = X[0].astype(np.float64), RNG.normal(size=(2, 5))
        indices = ints([0], [2])
        model = one_op("ScatterND", [x, indices, updates], [np.float64], 18, reduction="add")
        scatter, params = from_onnx(model, {"i1": indices})
        running, _ = from_onnx(one_op("CumProd", [x, ints(1)], [np.float64], 26), {"i1": ints(1)})
        run = jax.jit(lambda x, u: running.apply({}, scatter.apply(params, x, u)))
        check_grads(run, [jnp.asarray(x), jnp.asarray(updates)], 1, modes=["rev"])
