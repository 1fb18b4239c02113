"""Files that other people ship: imported, compiled, and compared with onnxruntime.

``.ci/run`` unpacks three packages from PyPI into a folder and names it in ``FNML_ONNX_MODELS``.
Among them are weights in Constants, nested branches, LSTMs, open sizes, Resize and ConvTranspose.
"""

import os
from pathlib import Path

import jax
import numpy as np
import onnxruntime
import pytest

from fnml.interop.onnx import from_onnx

FOLDER = os.environ.get("FNML_ONNX_MODELS")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOLDER is None, reason="FNML_ONNX_MODELS names no folder of models"),
]
RNG = np.random.default_rng(0)
RATE = {"sr": np.array(16_000, np.int64)}


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def voice(samples):
    return {"input": floats(1, samples), "state": floats(2, 1, 128), **RATE}


def line_of_text():
    """Draw strokes, dark on white: on noise a detector of text answers next to nothing."""
    image = np.full((1, 3, 96, 160), 2, np.float32)
    for column in range(32, 128, 6):
        image[:, :, 40:56, column : column + 2] = -2
    image[:, :, 40:42, 32:128] = -2
    return image


FILES = {
    "magika/models/standard_v3_3/model.onnx": {
        "bytes": RNG.integers(0, 256, (2, 2048)).astype(np.int32)
    },
    "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx": {"x": line_of_text()},
    "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx": {"x": floats(2, 3, 48, 64)},
    "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx": {"x": floats(2, 3, 48, 96)},
    "silero_vad/data/silero_vad.onnx": voice(576),
    "silero_vad/data/silero_vad_16k_op15.onnx": voice(576),
}


@pytest.mark.parametrize("name", FILES)
def test_a_real_file_computes_what_it_does_in_onnxruntime(name):
    path, inputs = Path(FOLDER) / name, FILES[name]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    expected = session.run(None, inputs)
    model, params = from_onnx(path, RATE if "sr" in inputs else None)
    assert jax.tree.leaves(params)
    got = jax.jit(model.apply)(params, *(inputs[port.name] for port in model.apply.inputs))
    for ours, theirs in zip(got if isinstance(got, tuple) else (got,), expected, strict=True):
        assert ours.shape == theirs.shape
        assert np.any(theirs)
        # Both compute in float32, and add up in another order.
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)
