"""``fnml export RUN --to onnx``: a run's model leaves, and is checked."""

import re
import shutil
import sys

import numpy as np
import onnxruntime as ort
import pytest

from fnml.cli import main
from fnml.recipes import Output, find_recipe, from_json, load, start

RUN = {"steps": 2, "batch_size": 16, "save_every": 2, "eval_every": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A perceptron, a residual network with moving averages, and a language model."""
    root = tmp_path_factory.mktemp("runs")
    text = root / "text"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 40)
    digits, lm = find_recipe("digits").config, find_recipe("lm").config
    networks = {
        "mlp": {"inputs": 64, "hidden": [8], "outputs": 10},
        "cnn": {"classes": 10, "widths": [2]},
    }
    for name, network in networks.items():
        config = from_json(digits, {"network": name, name: network, "run": {**RUN, "fuse": 1}})
        start("digits", config, root / name, Output(quiet=True))
    model = {"width": 16, "layers": 2, "heads": 1, "context": 16}
    run = {**RUN, "fuse": 1, "keep_memory": False}
    config = from_json(lm, {"model": model, "text": [str(text)], "run": run})
    start("lm", config, root / "lm", Output(quiet=True))
    return root


@pytest.fixture
def call(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        return caught.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_a_run_leaves_as_onnx(call, runs, tmp_path, name: str) -> None:
    path = tmp_path / "digits.onnx"
    code, out, err = call("export", runs / name, "--to", "onnx", "--path", path)
    assert (code, err) == (0, "")
    assert "input images uint8[B, 8, 8]\noutput output float[B, 10]\n" in out
    difference = re.search(r"checked in onnxruntime: relative difference (\S+)", out)
    assert difference and float(difference[1]) < 1e-5
    loaded = load(runs / name)
    batch = next(iter(loaded.task.held_out()))
    # Any number of images, as they are in the data set.
    images = batch["images"][:7]
    [logits] = ort.InferenceSession(path).run(None, {"images": images})
    expected = loaded.task.predict(loaded.state.params, images, state=loaded.state.model_state)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_language_model_of_any_length(call, runs) -> None:
    arguments = ["--dynamic", "B, T", "--constraints", "T <= 16", "--unroll", "2", "--opset", "19"]
    code, out, err = call("export", runs / "lm", *arguments)
    assert (code, err) == (0, "")
    assert "input tokens int32[B, T]\noutput output float[B, T, 256]\n" in out and "opset 19" in out
    session = ort.InferenceSession(runs / "lm" / "model.onnx")
    loaded = load(runs / "lm")
    tokens = np.frombuffer(b"the lazy", np.uint8).astype(np.int32)[None]
    [logits] = session.run(None, {"tokens": tokens})
    expected = loaded.task.predict(loaded.state.params, tokens, state=())
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_without_onnxruntime_the_importer_checks(call, runs, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, out, err = call("export", runs / "mlp", "--path", tmp_path / "m.onnx")
    assert (code, err) == (0, "")
    assert "checked in from_onnx: relative difference" in out


def test_a_file_that_computes_something_else_is_no_success(
    call, runs, tmp_path, monkeypatch
) -> None:
    from fnml.recipes import _export

    monkeypatch.setattr(_export, "_run", lambda path, fields: ([np.zeros((360, 10))], "a test"))
    code, out, err = call("export", runs / "mlp", "--path", tmp_path / "m.onnx")
    assert (code, out) == (1, "")
    assert "differ by 1 of their norm in a test" in err


def test_what_cannot_be_exported_is_said_in_a_sentence(call, runs, tmp_path) -> None:
    cases = {
        "there is no run directory": ("nowhere",),
        "expected 18 to": (runs / "mlp", "--opset", "3"),
        "it has no step 7|has no step 7": (runs / "mlp", "--step", "7"),
        "images: 'B' for an array": (runs / "mlp", "--dynamic", "B"),
        "No such file": (runs / "mlp", "--path", tmp_path / "no" / "m.onnx"),
    }
    for said, arguments in cases.items():
        code, out, err = call("export", *arguments)
        assert (code, out) == (1, ""), err
        assert re.search(said, err) and "Traceback" not in err


def test_a_damaged_run_is_named(call, runs, tmp_path) -> None:
    directory = shutil.copytree(runs / "mlp", tmp_path / "run")
    (directory / "config.json").write_text("{")
    code, _, err = call("export", directory)
    assert code == 1 and "config.json" in err
