"""Runs that cannot begin or go on: a sentence says why, and nothing good is lost."""

import shutil
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from run_processes import QUIET, digits, fnml, rows, sha256

from fnml.checkpoint import _checkpointer, verify
from fnml.recipes import find_recipe, load, read_result, start


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run that has finished."""
    directory = tmp_path_factory.mktemp("small") / "run"
    start("digits", digits(), directory, QUIET)
    return directory


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_good(tmp_path, capsys):
    directory = tmp_path / "run"
    options = ["--network", "mlp", "--mlp.hidden", "16", "--batch-size", "32", "--fuse", "1"]
    often = ["--learning-rate", "1e30", "--warmup", "0", "--save-every", "1", "--steps", "9"]
    assert fnml("train", "digits", *options, *often, "--out", directory) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert "the loss of step 2 is" in captured.err or "the loss of step 3 is" in captured.err
    assert "Lower the learning rate" in captured.err
    assert read_result(directory) is None
    loaded = load(directory)
    assert loaded.step in (1, 2)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in loaded.state.params["head"].values())
    assert fnml("resume", directory) == 1
    assert "the loss of step" in capsys.readouterr().err


def test_a_result_may_hold_an_infinite_evaluation(tmp_path, monkeypatch, capsys):
    recipe = find_recipe("digits")

    def build(config, directory):
        task = recipe.build(config, directory)

        def infinite(params, batch, key, **options):
            loss, metrics = task.eval_loss_fn(params, batch, key, **options)
            return loss * jnp.inf, metrics

        return task._replace(eval_loss_fn=infinite)

    for module in ("_run", "_plugins"):
        monkeypatch.setattr(
            f"fnml.recipes.{module}.find_recipe", lambda name: recipe._replace(build=build)
        )
    done = start("digits", digits(), tmp_path / "run", QUIET)
    assert done.result["eval"]["loss"] == np.inf
    assert read_result(tmp_path / "run")["eval"]["loss"] == np.inf
    assert fnml("runs", tmp_path / "run") == 0
    assert "inf" in capsys.readouterr().out


def test_what_is_refused_leaves_no_directory(tmp_path, capsys):
    options = ["--network", "mlp", "--steps", "3", "--out", tmp_path / "run"]
    for wrong in (
        ["--sinks", "jsonl", "jsnol"],
        ["--sinks", "jsonl", "jsonl"],
        ["--decay", "no/such/path"],
        ["--prometheus-port", "70000"],
        ["--learning-rate", "inf"],
        ["--mlp.inputs", "63"],
        ["--batch-size", "99999999999999"],
    ):
        assert fnml("train", "digits", *options, *wrong) in (1, 2)
        captured = capsys.readouterr()
        assert captured.err and "Traceback" not in captured.err
        assert not (tmp_path / "run").exists(), wrong


def test_a_save_that_fails_in_the_background_ends_the_run_at_the_next_step(
    tmp_path, monkeypatch, capsys
):
    """Not at the next save, which is half a run away."""

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_checkpointer, "write_step", full)
    directory = tmp_path / "run"
    options = ["--network", "mlp", "--mlp.hidden", "16", "--batch-size", "32", "--steps", "4000"]
    often = ["--save-every", "2000", "--log-every", "10", "--eval-every", "4000"]
    assert fnml("train", "digits", *options, *often, "--out", directory) == 1
    assert "step 2000 was not saved" in capsys.readouterr().err
    last = rows(directory)[-1][0]
    assert 1900 <= last < 3000


def test_what_a_killed_process_left_is_swept_and_nothing_else(small, tmp_path):
    run = shutil.copytree(small, tmp_path / "run")
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "00000012")
    (run / "checkpoints" / ".tmp-12-99999999").mkdir()
    for name in (".metrics.csv.99999999.tmp", ".result.json.1.tmp", ".mine.tmp", "x.1.tmp"):
        (run / name).write_text("x")
    assert fnml("resume", run) == 0
    left = {path.name for path in run.rglob("*") if "tmp" in path.name}
    assert left == {".mine.tmp", "x.1.tmp"}
    assert sha256(run) == sha256(small)


def test_another_runs_directory_is_refused(small, capsys):
    before = sorted((small).rglob("*"))
    assert fnml("train", "digits", "--network", "mlp", "--out", small) == 1
    assert "holds another run: continue it with 'fnml resume" in capsys.readouterr().err
    assert sorted((small).rglob("*")) == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", where],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield where
    subprocess.run(["umount", where], check=True)


def test_a_full_disk_ends_the_run_and_keeps_what_was_good(small, small_disk, capsys):
    directory = small_disk / "run"
    options = ["--network", "mlp", "--mlp.hidden", "16", "--batch-size", "32", "--steps", "12"]
    often = ["--eval-every", "5", "--save-every", "1", "--keep-last", "50", "--fuse", "4"]
    assert fnml("train", "digits", *options, *often, "--out", directory) == 1
    captured = capsys.readouterr()
    assert "was not saved" in captured.err and "earlier steps are unharmed" in captured.err
    assert "bytes are free" in captured.err or "are free: make room" in captured.err
    assert "Traceback" not in captured.err
    assert read_result(directory) is None
    found = verify(directory / "checkpoints")
    assert found and all(not faults for faults in found.values())
    assert load(directory).step == max(found)

    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    assert fnml("resume", directory) == 0
    assert sha256(directory) == sha256(small)
