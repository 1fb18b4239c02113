"""Runs with C++ bodies: close to those without, repeatable, and refused before anything is written."""

import numpy as np
import pytest
from run_processes import TEXT, digits, fnml

from fnml.checkpoint import restore
from fnml.pallas_kernels import native_faults
from fnml.recipes import find_recipe
from fnml.recipes._training import initial_state, make_step

LM = [
    *["lm", "--width", "32", "--layers", "1", "--heads", "2", "--context", "32"],
    *["--batch-size", "4", "--fuse", "2", "--text", str(TEXT), "--log-every", "2"],
    *["--eval-every", "4", "--steps", "4", "--name", "sgd", "--learning-rate", "0.1", "--quiet"],
]


def momentum(directory):
    found = restore(directory / "checkpoints").state
    leaves = [x for name, x in found.items() if name.startswith("opt_state") and np.ndim(x)]
    return np.concatenate([np.float64(x).ravel() for x in leaves])


@pytest.mark.skipif(bool(native_faults()), reason="; ".join(native_faults()))
def test_a_native_run_is_close_to_a_plain_one_and_repeats(tmp_path):
    for name, flag in (("plain", "--no-native"), ("one", "--native"), ("two", "--native")):
        assert fnml("train", *LM, flag, "--out", tmp_path / name) == 0
    plain, one, two = (momentum(tmp_path / name) for name in ("plain", "one", "two"))
    np.testing.assert_array_equal(one, two)
    assert 0 < np.linalg.norm(one - plain) <= 1e-4 * np.linalg.norm(plain)


def test_without_a_compiler_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert fnml("train", *LM, "--native", "--out", tmp_path / "run") == 1
    assert "CXX=no-such-compiler" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(bool(native_faults()), reason="; ".join(native_faults()))
def test_only_a_native_run_calls_cpp():
    for native in (False, True):
        config = digits(network="cnn", run={"native": native})
        task = find_recipe("digits").build(config, None)
        state = initial_state(task, config)
        program = make_step(task, config).lower(state, task.train.at(task.train.position))
        assert ("fnml_" in program.as_text()) is native
