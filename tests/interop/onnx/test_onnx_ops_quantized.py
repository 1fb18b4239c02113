import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_op import in_importer, one_op, same
from onnx import helper

from fnml.interop.onnx._ops_cast import convert

RNG = np.random.default_rng(0)
X = RNG.uniform(-3, 3, size=(3, 8)).astype(np.float32)
INTEGERS = [np.int8, np.uint8, np.int16, np.uint16]


def numbers(dtype, *shape):
    info = np.iinfo(dtype)
    return RNG.integers(info.min, info.max, shape, endpoint=True).astype(dtype)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("shape", [(), (8,), (3, 2)])
def test_quantize_and_dequantize_equal_onnxruntime(shape, dtype):
    # A scalar is for the tensor, [8] for axis 1, [3, 2] for blocks of four along axis 1.
    scale = np.asarray(RNG.uniform(0.01, 0.1, size=shape), np.float32)
    zero = numbers(np.int8, *shape).astype(dtype) if shape else np.asarray(3, dtype)
    block = {"block_size": 4} if shape == (3, 2) else {}
    same("QuantizeLinear", [X, scale, zero], [dtype], axis=1, **block)
    q = numbers(dtype, 3, 8)
    same("DequantizeLinear", [q, scale, zero], axis=1, **block)


@pytest.mark.parametrize("size", [0.05, 0.0078125, 1 / 255])
def test_halves_of_the_scale_round_to_even(size):
    scale = np.float32(size)
    halves = np.arange(-60, 60, 0.5, np.float32) * scale
    # Beside the halves, where XLA's product with the rounded reciprocal errs.
    x = np.concatenate([np.nextafter(halves, np.float32(side)) for side in (-9, 9)])
    x = np.concatenate([x, halves])
    same("QuantizeLinear", [x, np.asarray(scale), np.asarray(0, np.int8)], [np.int8])


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=1).map(lambda x: x * 12))
@settings(max_examples=5)
def test_dynamic_quantize_of_one_value_equals_onnxruntime(values):
    x = np.array(values, np.float32)
    same("DynamicQuantizeLinear", [x], [np.uint8, np.float32, np.uint8], opset=11)


def test_dynamic_quantize_equals_onnxruntime():
    for seed in range(8):
        x = np.random.default_rng(seed).normal(size=12).astype(np.float32)
        same("DynamicQuantizeLinear", [x], [np.uint8, np.float32, np.uint8], opset=11)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_matmul_integer_equals_onnxruntime(dtype):
    a, b = numbers(dtype, 2, 3, 4), numbers(dtype, 4, 5)
    zero_a, zero_b = np.asarray(3, dtype), numbers(dtype, 5)
    same("MatMulInteger", [a, b, zero_a, zero_b], [np.int32], opset=10)


def scalar(value, dtype=np.float32):
    return np.asarray(value, dtype)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_quantized_products_equal_onnxruntime(dtype):
    a, b = numbers(dtype, 2, 3, 4), numbers(dtype, 4, 5)
    scales = scalar(0.02), RNG.uniform(0.01, 0.05, size=5).astype(np.float32), scalar(0.3)
    zeros = scalar(1, dtype), np.full(5, 2, dtype), scalar(7, dtype)
    inputs = [a, scales[0], zeros[0], b, scales[1], zeros[1], scales[2], zeros[2]]
    same("QLinearMatMul", inputs, [dtype], opset=10, atol=1)


@pytest.mark.parametrize("group", [1, 2])
def test_quantized_convolution_equals_onnxruntime(group):
    x, w = numbers(np.uint8, 2, 4, 6, 5), numbers(np.int8, 6, 4 // group, 3, 2)
    inputs = [x, scalar(0.02), scalar(120, np.uint8)]
    inputs += [w, RNG.uniform(0.01, 0.03, size=6).astype(np.float32), np.zeros(6, np.int8)]
    inputs += [scalar(0.7), scalar(11, np.uint8), numbers(np.int8, 6).astype(np.int32) * 50]
    window = {"strides": [2, 1], "pads": [1, 0, 1, 1], "group": group}
    # Rounded once here; onnxruntime scales in another order.
    same("QLinearConv", inputs, [np.uint8], opset=10, atol=1, **window)
    same("ConvInteger", [x, w, inputs[2]], [np.int32], opset=10, **window)
    automatic = {"auto_pad": "SAME_LOWER", "group": group, "strides": [2, 1]}
    same("QLinearConv", inputs, [np.uint8], opset=10, atol=1, **automatic)


FLOAT8 = [
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e4m3fnuz,
    ml_dtypes.float8_e5m2,
    ml_dtypes.float8_e5m2fnuz,
]


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("saturate", [0, 1])
def test_float8_saturates_where_asked(saturate, dtype):
    top = float(ml_dtypes.finfo(dtype).max)
    x = np.array([1e9, -1e9, np.inf, -np.inf, np.nan, 0.3, top], np.float32)
    code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = one_op("Cast", [x], [dtype], to=code, saturate=saturate)
    (got,) = in_importer(model, [x])
    got = np.asarray(got).astype(np.float32)
    np.testing.assert_array_equal(got[4:], x[4:].astype(dtype).astype(np.float32))
    if saturate:
        np.testing.assert_array_equal(got[:4], [top, -top, top, -top])
    else:
        infinite = dtype == ml_dtypes.float8_e5m2
        expected = [np.inf, -np.inf] * 2 if infinite else [np.nan] * 4
        np.testing.assert_array_equal(got[:4], expected)


@pytest.mark.parametrize("mode", ["up", "down", "nearest"])
def test_float8_e8m0_rounds_its_exponent(mode):
    x = 2.0 ** np.linspace(-140, 127.9, 200)
    x = np.concatenate([x, 2.0 ** np.arange(-126, 127), 1.5 * 2.0 ** np.arange(-126, 126)])
    x = x.astype(np.float32)
    # "nearest" is by distance: from one and a half on, up.
    exact = np.log2(x.astype(np.float64))
    below = np.floor(exact)
    steps = {"up": np.ceil(exact), "down": below}
    steps["nearest"] = below + (x.astype(np.float64) / 2.0**below >= 1.5)
    expected = 2.0 ** np.clip(steps[mode], -127, 127)
    for got in (
        convert(x, ml_dtypes.float8_e8m0fnu, round_mode=mode),
        jax.jit(lambda x: convert(x, ml_dtypes.float8_e8m0fnu, round_mode=mode))(x),
    ):
        np.testing.assert_array_equal(np.asarray(got).astype(np.float64), expected)


def test_integers_below_a_byte_keep_the_low_bits_and_the_sign():
    x = np.arange(-20, 20, dtype=np.float32)
    for dtype, bits in ((ml_dtypes.int4, 4), (ml_dtypes.uint4, 4), (ml_dtypes.int2, 2)):
        low = x.astype(np.int64) % 2**bits
        signed = np.where(low >= 2 ** (bits - 1), low - 2**bits, low)
        expected = low if dtype == ml_dtypes.uint4 else signed
        for got in (convert(x, dtype), jax.jit(lambda x, dtype=dtype: convert(x, dtype))(x)):
            np.testing.assert_array_equal(np.asarray(got).astype(np.int64), expected)


def test_strings_become_numbers_and_back():
    texts = np.array(["3.5", "-INF", "1e-3", "NaN"], object)
    np.testing.assert_array_equal(
        convert(texts, np.float32), np.array([3.5, -np.inf, 1e-3, np.nan], np.float32)
    )
    assert convert(np.array(["12", "-7"], object), np.int64).tolist() == [12, -7]
    assert convert(np.array([0.1, 2.0], np.float32), object).tolist() == ["0.1", "2.0"]
