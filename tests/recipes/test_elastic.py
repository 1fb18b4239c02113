"""A run goes on with other numbers of devices, and ends with the same bits."""

import json
import shutil

import pytest
from run_processes import QUIET, TEXT, fnml, newest_step, rows, sha256

from fnml.checkpoint import restore, tree_sha256, verify
from fnml.core import ConfigError
from fnml.recipes import RunConfig, read_record, resume

# Dropout, a norm that is clipped, a schedule, eight shards, blocks that the saves cut short.
LM = [
    *["lm", "--width", "32", "--layers", "2", "--heads", "2", "--context", "32"],
    *["--dropout", "0.2", "--batch-size", "8", "--accumulate", "8", "--fuse", "3"],
    *["--no-keep-memory", "--text", str(TEXT), "--log-every", "1", "--eval-every", "10"],
    *["--save-every", "4", "--keep-last", "9", "--steps", "16", "--warmup", "2"],
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run on one device."""
    directory = tmp_path_factory.mktemp("elastic") / "whole"
    assert fnml("train", *LM, "--quiet", "--out", directory) == 0
    return directory


def cut(directory, step):
    """Make a finished run one that was killed just after the checkpoint of ``step``."""
    (directory / "result.json").unlink()
    for path in (directory / "checkpoints").glob("[0-9]*"):
        if int(path.name) > step:
            shutil.rmtree(path)


def hashes(directory):
    checkpoints = directory / "checkpoints"
    return {
        step: tree_sha256(restore(checkpoints, step=step).state) for step in verify(checkpoints)
    }


def test_resumed_on_8_then_2_then_4_devices_it_has_the_bits_of_one(whole, tmp_path, caplog):
    directory = shutil.copytree(whole, tmp_path / "run")
    expected = hashes(whole)
    assert sorted(expected) == [4, 8, 12, 16]
    for devices, step in ((8, 4), (2, 8), (4, 12)):
        cut(directory, step)
        resume(directory, QUIET, devices=devices)
        found = restore(directory / "checkpoints", step=16)
        assert found.meta["config"]["run"]["devices"] == devices
        assert sha256(directory) == sha256(whole)
        assert rows(directory) == rows(whole)
        assert hashes(directory) == expected
    assert read_record(directory)["config"]["run"]["devices"] == 1
    assert "compiled again" not in caplog.text


def test_a_run_that_began_on_devices_goes_on_without(whole, tmp_path):
    directory = tmp_path / "run"
    assert fnml("train", *LM, "--devices", "8", "--quiet", "--out", directory) == 0
    assert sha256(directory) == sha256(whole)
    cut(directory, 8)
    assert fnml("resume", directory, "--devices", "1") == 0
    assert sha256(directory) == sha256(whole)
    assert rows(directory) == rows(whole)


def test_what_changes_the_bits_may_not_change(whole, tmp_path):
    directory = shutil.copytree(whole, tmp_path / "run")
    cut(directory, 8)
    with pytest.raises(ConfigError, match="shared by 1 or 2 or 4 or 8 devices"):
        resume(directory, QUIET, devices=3)
    record = json.loads((directory / "config.json").read_text())
    record["config"]["run"]["accumulate"] = 4
    (directory / "config.json").write_text(json.dumps(record))
    assert fnml("resume", directory, "--devices", "2") == 1
    assert newest_step(directory) == 8


def test_devices_share_shards_evenly():
    assert RunConfig(batch_size=24, accumulate=24, devices=3).devices == 3
    for accumulate, devices in ((1, 2), (6, 2), (8, 16), (8, 0)):
        with pytest.raises(ConfigError, match="devices="):
            RunConfig(batch_size=48, accumulate=accumulate, devices=devices)


def test_too_few_devices_are_refused(tmp_path, capsys):
    options = [*LM, "--batch-size", "16", "--accumulate", "16", "--devices", "16"]
    assert fnml("train", *options, "--out", tmp_path / "run") == 1
    assert "devices=16: there are 8 (cpu) here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
