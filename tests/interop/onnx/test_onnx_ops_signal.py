import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from one_op import in_importer, one_op, same

from fnml.interop.onnx import from_onnx

RNG = np.random.default_rng(0)
REAL, COMPLEX = (RNG.normal(size=(2, 7, 3, k)).astype(np.float32) for k in (1, 2))


def scalar(value):
    return np.asarray(value, np.int64)


def parts(z):
    return np.stack([z.real, z.imag], axis=-1)


@pytest.mark.parametrize("length", [None, 5, 10])
def test_dft_equals_numpy(length):
    size = None if length is None else scalar(length)
    z = COMPLEX[..., 0] + 1j * COMPLEX[..., 1].astype(np.float64)
    cases = [
        (REAL, {}, parts(np.fft.fft(REAL[..., 0], length, axis=1))),
        (REAL, {"onesided": 1}, parts(np.fft.rfft(REAL[..., 0], length, axis=1))),
        (COMPLEX, {}, parts(np.fft.fft(z, length, axis=1))),
        (COMPLEX, {"inverse": 1}, parts(np.fft.ifft(z, length, axis=1))),
        (COMPLEX, {"inverse": 1, "onesided": 1}, np.fft.irfft(z, length, axis=1)[..., None]),
    ]
    for x, attributes, expected in cases:
        inputs = [x, size, scalar(1)]
        (got,) = in_importer(one_op("DFT", inputs, opset=20, **attributes), inputs)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_old_dft_equals_onnxruntime():
    for x in (REAL, COMPLEX):
        same("DFT", [x], opset=17, axis=2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("onesided", [0, 1])
def test_stft_equals_onnxruntime(onesided):
    signal, window = RNG.normal(size=(2, 32, 1)), np.hanning(8)
    inputs = [signal.astype(np.float32), scalar(5), window.astype(np.float32), scalar(8)]
    same("STFT", inputs, opset=17, rtol=1e-4, atol=1e-5, onesided=onesided)


def test_stft_gradient():
    with jax.enable_x64(True):
        inputs = [RNG.normal(size=(1, 12, 1)), scalar(3), np.hanning(6)]
        model = one_op("STFT", inputs, [np.float64], opset=17)
        imported, params = from_onnx(model, static_inputs={"i1": inputs[1]})
        run = jax.jit(lambda x, window: imported.apply(params, x, window))
        check_grads(run, [jnp.asarray(inputs[0]), jnp.asarray(inputs[2])], 1, modes=["rev"])


@pytest.mark.parametrize("op", ["HannWindow", "HammingWindow", "BlackmanWindow"])
@pytest.mark.parametrize("periodic", [0, 1])
def test_windows_equal_onnxruntime(periodic, op):
    for size in (1, 2, 9):
        if size > 1 or periodic:
            same(op, [scalar(size)], opset=17, periodic=periodic)


def test_mel_weights_equal_onnxruntime():
    edges = [np.asarray(20.0, np.float32), np.asarray(4000.0, np.float32)]
    for bands, size, rate in ((8, 64, 16000), (16, 256, 8192)):
        same("MelWeightMatrix", [scalar(bands), scalar(size), scalar(rate), *edges], opset=17)
