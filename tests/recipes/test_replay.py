"""Any step of a run is rebuilt to the bit, from any checkpoint before it."""

import shutil

import numpy as np
import pytest
from run_processes import QUIET, digits, fnml, rows

from fnml.checkpoint import Checkpointer, load_safetensors, restore, tree_sha256
from fnml.core import ConfigError, DataError, RunError
from fnml.recipes import find_recipe, replay, start, without_keys

RUN = {"keep_last": 9, "log_every": 1}


@pytest.fixture(scope="module", params=[4, 1], ids=["fused", "one by one"])
def run(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("replay") / "run"
    start("digits", digits(run={**RUN, "fuse": request.param}), directory, QUIET)
    return directory


def saved(directory, step):
    return tree_sha256(restore(directory / "checkpoints", step=step).state)


def state_sha256(state):
    # Of a checkpoint read without a target, keys are their key data.
    return tree_sha256(without_keys(state))


def test_every_step_leads_to_what_was_saved_and_logged(run, tmp_path):
    losses = {step: values["loss"] for step, kind, values in rows(run) if kind == "train"}
    files = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    for step, begin in ((1, 0), (5, 0), (6, 5), (10, 5), (12, 10)):
        found = replay(run, step)
        assert (found.step, found.start) == (step, begin)
        assert found.metrics["loss"] == losses[step]
        assert int(found.state.step) == step - 1
        if step in (6, 11):
            assert state_sha256(found.state) == saved(run, step - 1)
        if step in (5, 10, 12):
            assert state_sha256(found.after) == saved(run, step)
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == files

    bare = shutil.copytree(run, tmp_path / "bare")
    shutil.rmtree(bare / "checkpoints")
    again = replay(bare, 12)
    assert again.start == 0
    assert state_sha256(again.after) == saved(run, 12)


def test_a_damaged_checkpoint_is_passed_over(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "checkpoints" / "00000010" / "meta.json").write_bytes(b"{}")
    found = replay(copy, 12)
    assert found.start == 5
    assert state_sha256(found.after) == saved(run, 12)


def test_the_batch_is_the_examples_named(run):
    found = replay(run, 7)
    task = find_recipe("digits").build(digits(run=RUN), None)
    assert len(set(found.examples.tolist())) == 32
    expected = task.train.source.gather(found.examples)
    for name, value in expected.items():
        np.testing.assert_array_equal(found.batch[name], value)


def test_steps_that_are_not_there(run, tmp_path):
    for step in (0, 13):
        with pytest.raises(ConfigError, match=f"step={step}: the run has the steps 1 to 12"):
            replay(run, step)
    with pytest.raises(RunError, match="no run directory"):
        replay(tmp_path / "none", 1)


def test_other_data_is_refused(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    found = restore(copy / "checkpoints", step=12)
    found.meta["data"]["fingerprint"] = "0" * 32
    shutil.rmtree(copy / "checkpoints")
    with Checkpointer(copy / "checkpoints") as keeper:
        keeper.save(5, replay(run, 6).state, found.meta)
    with pytest.raises(DataError, match="the data has other content"):
        replay(copy, 7)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_the_command_prints_hashes_and_saves(run, tmp_path, capsys, suffix):
    file = tmp_path / f"step.{suffix}"
    assert fnml("replay", run, "--step", "6", "--save", file) == 0
    out = capsys.readouterr().out
    found = replay(run, 6)
    assert f"state_sha256 {tree_sha256(found.state)}" in out
    assert f"batch_sha256 {tree_sha256(found.batch)}" in out
    assert f"loss {found.metrics['loss']!r}" in out
    assert "from the checkpoint of step 5" in out
    read = dict(np.load(file)) if suffix == "npz" else load_safetensors(file)
    expected = {f"state/{name}": x for name, x in without_keys(found.state).items()}
    expected |= {f"batch/{name}": x for name, x in found.batch.items()}
    assert tree_sha256(read) == tree_sha256(expected)


def test_another_kind_of_file_is_refused(run, tmp_path, capsys):
    assert fnml("replay", run, "--step", "6", "--save", tmp_path / "x.pkl") == 1
    assert "expected a name in .safetensors or .npz" in capsys.readouterr().err
