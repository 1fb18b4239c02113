"""``fnml eval MODEL.onnx``: a file is measured without a run."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnml
from fnml.cli import main
from fnml.recipes import evaluate_onnx


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    params = {"kernel": jnp.eye(3)}
    fnml.to_onnx(
        lambda params, x: x @ params["kernel"],
        jax.ShapeDtypeStruct((2, 3), jnp.float32),
        params=params,
        path=root / "line.onnx",
        dynamic="B, ...",
    )
    x = np.eye(3, dtype=np.float32)[[0, 1, 2, 2]]
    np.savez(root / "data.npz", x=x, targets=np.array([0, 1, 2, 0]))
    np.savez(root / "arrays.npz", x=x, targets=np.zeros((4, 3)))
    return root


@pytest.fixture
def call(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        return caught.value.code, *capsys.readouterr()

    return run


def test_a_file_has_its_loss_and_accuracy(call, folder) -> None:
    code, out, err = call("eval", folder / "line.onnx", "--data", folder / "data.npz")
    assert (code, err) == (0, "")
    lines = dict(line.split(" ") for line in out.splitlines())
    assert lines["accuracy"] == "0.75" and set(lines) == {"accuracy", "loss"}
    # Logits are 1 for one class and 0 for two, and one target of four is another class.
    assert float(lines["loss"]) == pytest.approx(np.log(np.e + 2) - 0.75, rel=1e-5)
    code, out, _ = call(
        "eval", folder / "line.onnx", "--data", folder / "arrays.npz", "--loss", "mse"
    )
    assert (code, out) == (0, f"loss {1 / 3:.6g}\n")
    assert evaluate_onnx(folder / "line.onnx", folder / "arrays.npz", "mse").keys() == {"loss"}


def test_what_cannot_be_measured_is_said_in_a_sentence(call, folder) -> None:
    data = ["--data", folder / "data.npz"]
    cases = {
        "Give --data": (folder / "line.onnx",),
        "chooses a checkpoint of a run": (folder / "line.onnx", *data, "--step", "1"),
        "are for ONNX files": (folder, *data),
        r"no\.onnx: cannot be read": (folder / "no.onnx", *data),
        r"expected class numbers": (folder / "line.onnx", "--data", folder / "arrays.npz"),
        r"no\.npz": (folder / "line.onnx", "--data", folder / "no.npz"),
        "no run directory": (folder / "no",),
    }
    for said, arguments in cases.items():
        code, out, err = call("eval", *arguments)
        assert (code, out) == (1, ""), err
        assert re.search(said, err) and "Traceback" not in err
