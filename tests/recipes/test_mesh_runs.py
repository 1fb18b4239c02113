"""Runs that the compiler divides over a mesh: close to one device, and resumed on another mesh."""

import shutil

import jax
import numpy as np
import pytest
from run_processes import QUIET, TEXT, digits, fnml

from fnml.checkpoint import restore, verify
from fnml.core import ConfigError
from fnml.recipes import RunConfig, find_recipe, read_record, resume
from fnml.recipes._training import initial_state, make_step, placed

# Plain descent with momentum, whose state is a sum of gradients; a clipped norm, micro-batches.
LM = [
    *["lm", "--width", "32", "--layers", "2", "--heads", "2", "--context", "32"],
    *["--batch-size", "8", "--accumulate", "2", "--fuse", "2", "--no-keep-memory"],
    *["--text", str(TEXT), "--log-every", "1", "--eval-every", "4", "--save-every", "2"],
    *["--steps", "4", "--keep-last", "9", "--name", "sgd", "--learning-rate", "0.1"],
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run on one device."""
    directory = tmp_path_factory.mktemp("mesh") / "alone"
    assert fnml("train", *LM, "--quiet", "--out", directory) == 0
    return directory


def momentum(directory):
    """Return the optimizer's state after the last step: what all gradients add up to."""
    found = restore(directory / "checkpoints")
    assert found.step == 4
    leaves = [x for name, x in found.state.items() if name.startswith("opt_state") and np.ndim(x)]
    return np.concatenate([np.float64(x).ravel() for x in leaves])


def assert_close(directory, expected):
    found, wanted = momentum(directory), momentum(expected)
    # Four steps of descent pull apart what began as rounding.
    assert np.linalg.norm(found - wanted) <= 1e-4 * np.linalg.norm(wanted)


def test_a_run_on_a_mesh_is_close_to_one_device_and_goes_on_on_another(alone, tmp_path, caplog):
    directory = tmp_path / "run"
    layout = ["--mesh", "data=2,model=2", "--rules", "fsdp+tensor"]
    assert fnml("train", *LM, *layout, "--quiet", "--out", directory) == 0
    assert_close(directory, alone)
    (directory / "result.json").unlink()
    (newest,) = (directory / "checkpoints").glob("*4")
    shutil.rmtree(newest)
    resume(directory, QUIET, mesh="data=4", rules="fsdp")
    assert_close(directory, alone)
    assert sorted(verify(directory / "checkpoints")) == [2, 4]
    kept = restore(directory / "checkpoints").meta["config"]["run"]
    assert (kept["mesh"], kept["rules"]) == ("data=4", "fsdp")
    assert read_record(directory)["config"]["run"]["mesh"] == "data=2,model=2"
    assert "compiled again" not in caplog.text


def test_every_device_holds_its_part_before_and_after_a_step():
    config = digits(run={"mesh": "data=4", "rules": "fsdp"})
    task = find_recipe("digits").build(config, None)
    state = initial_state(task, config)
    step = make_step(task, config)
    new, _ = step(placed(state, task, config), task.train.at(task.train.position))
    for found in (state, new):
        kernel = found.params["hidden"][0]["kernel"]
        moment = next(x for x in jax.tree.leaves(found.opt_state) if x.shape == kernel.shape)
        for x in (kernel, moment):
            assert x.addressable_shards[0].data.shape == (64 // 4, 16)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mesh": "data"}, ["'data' is no axis=size"]),
        ({"mesh": "data=2", "rules": "fsd"}, ["'fsd'", "Did you mean 'fsdp'"]),
        ({"rules": "tensor"}, ["['model']", "mesh='' does not have", "add model=2"]),
        ({"mesh": "data=2,model=2", "rules": "fsdp"}, ["nothing is divided along ['model']"]),
        ({"mesh": "data=2", "devices": 2, "accumulate": 2}, ["give one of them"]),
        ({"mesh": "data=8", "accumulate": 2, "batch_size": 8}, ["8 devices", "4 examples"]),
    ],
)
def test_a_layout_that_does_not_come_out_is_refused(given, words):
    with pytest.raises(ConfigError) as error:
        RunConfig(**given)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_too_few_devices_are_refused_before_there_is_a_directory(tmp_path, capsys):
    options = ["--batch-size", "32", "--mesh", "data=16", "--rules", "fsdp"]
    assert fnml("train", *LM, *options, "--out", tmp_path / "run") == 1
    assert "there are 8 (cpu) here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
