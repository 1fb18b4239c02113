"""Whole runs: the same bits twice, after any interruption, and nothing lost when things go wrong.

The references run in this process, with its eight virtual devices and strict promotion; what is
killed runs in processes of its own. Equal hashes across both also say that neither matters.
"""

import json
import logging
import shutil
import signal
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from run_processes import (
    DIGITS,
    LM,
    QUIET,
    TEXT,
    digits,
    fnml,
    fnml_process,
    newest_step,
    rows,
    sha256,
    table,
    wait_until_past,
)

from fnml.checkpoint import verify
from fnml.core import CheckpointError, DataError, RunError
from fnml.recipes import (
    evaluate,
    load,
    read_record,
    read_result,
    resume,
    start,
)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """The uninterrupted runs that every interrupted one has to end as."""
    root = tmp_path_factory.mktemp("references")
    for name, options in (("digits", DIGITS), ("lm", LM)):
        assert fnml("train", name, *options, "--quiet", "--out", root / name) == 0
    start("digits", digits(), root / "small", QUIET)
    return root


def check_same(directory, reference):
    assert sha256(directory) == sha256(reference)
    assert rows(directory) == rows(reference)
    assert table(directory) == table(reference)
    same = ("recipe", "step", "stopped", "train", "eval")
    one, two = read_result(directory), read_result(reference)
    assert {name: one[name] for name in same} == {name: two[name] for name in same}
    assert all(not faults for faults in verify(directory / "checkpoints").values())


def test_a_run_repeated_has_the_same_bits(references, tmp_path):
    start("digits", digits(), tmp_path / "again", QUIET)
    check_same(tmp_path / "again", references / "small")
    other = start("digits", digits(run={"seed": 1}), tmp_path / "other", QUIET)
    assert other.result["params_sha256"] != sha256(references / "small")


def test_a_finished_run_has_its_record(references):
    directory = references / "digits"
    record, result = read_record(directory), read_result(directory)
    assert record["recipe"] == "digits"
    assert (result["step"], result["stopped"]) == (120, None)
    assert result["seconds"] > 0
    assert record["environment"].keys() == result["environment"].keys()
    found = rows(directory)
    assert [step for step, kind, _ in found if kind == "train"] == list(range(4, 121, 4))
    assert [step for step, kind, _ in found if kind == "eval"] == [40, 80, 120]
    assert result["train"] == found[-2][2]
    assert result["eval"] == found[-1][2] == evaluate(load(directory))
    # The last three, and the best of the evaluated ones if it is not among them.
    assert sorted(verify(directory / "checkpoints"))[-3:] == [90, 105, 120]


@pytest.mark.parametrize("fuse", [1, 7])
def test_fused_steps_have_the_same_bits(references, tmp_path, fuse):
    assert fnml("train", *DIGITS, "--fuse", fuse, "--quiet", "--out", tmp_path / "run") == 0
    check_same(tmp_path / "run", references / "digits")


def test_accumulation_changes_rounding_only(tmp_path):
    options = [*LM, "--dropout", "0", "--steps", "10", "--warmup", "0", "--quiet", "--sinks"]
    evals = []
    for accumulate in (1, 2, 4):
        out = tmp_path / str(accumulate)
        assert fnml("train", "lm", *options, "--accumulate", accumulate, "--out", out) == 0
        evals.append(read_result(out)["eval"]["loss"])
    # Adam divides by the gradient's size, so rounding in near-zero gradients is not small.
    np.testing.assert_allclose(evals, evals[0], rtol=2e-3)
    assert abs(evals[0] - np.log(256)) > 0.2, "nothing was learnt, so nothing was compared"


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A digits run that SIGKILL ended half-way, to be copied."""
    directory = tmp_path_factory.mktemp("killed") / "run"
    with fnml_process("train", "digits", *DIGITS, "--out", directory) as process:
        wait_until_past(process, directory, 45)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert read_result(directory) is None
    assert 45 <= newest_step(directory) < 120
    return directory


@pytest.fixture
def copy(killed, tmp_path):
    return shutil.copytree(killed, tmp_path / "copy")


@pytest.mark.slow
def test_killed_and_resumed_in_new_processes_it_has_the_same_bits(references, copy, tmp_path):
    with fnml_process("resume", copy) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in err and "\x1b" not in out + err
    assert sha256(references / "digits") in out
    check_same(copy, references / "digits")


@pytest.mark.slow
def test_a_language_model_killed_with_dropout_and_accumulation(references, tmp_path):
    directory = tmp_path / "run"
    with fnml_process("train", "lm", *LM, "--out", directory) as process:
        wait_until_past(process, directory, 30)
        process.kill()
    assert 30 <= newest_step(directory) < 100
    resume(directory, QUIET)
    check_same(directory, references / "lm")


def test_killed_before_its_first_checkpoint_it_begins_again(references, copy):
    shutil.rmtree(copy / "checkpoints")
    resume(copy, QUIET)
    check_same(copy, references / "digits")


def test_killed_between_the_last_checkpoint_and_the_result(references, tmp_path):
    directory = shutil.copytree(references / "small", tmp_path / "run")
    (directory / "result.json").unlink()
    resume(directory, QUIET)
    check_same(directory, references / "small")


def damage(directory):
    """Flip one bit of the newest checkpoint's largest file; return its name."""
    step = directory / "checkpoints" / f"{newest_step(directory):08d}"
    file = max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return file.relative_to(step).as_posix()


def test_a_damaged_checkpoint_is_named_and_an_older_one_used(references, copy, caplog):
    newest, name = newest_step(copy), damage(copy)
    with caplog.at_level(logging.WARNING):
        resume(copy, QUIET)
    assert f"step {newest} is damaged: {name} has sha256" in caplog.text
    assert "trying an older one" in caplog.text
    check_same(copy, references / "digits")


def test_without_an_undamaged_checkpoint_nothing_is_touched(copy):
    steps = sorted(path.name for path in (copy / "checkpoints").iterdir())
    before = rows(copy)
    for name in steps:
        (copy / "checkpoints" / name / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="holds no undamaged step"):
        resume(copy, QUIET)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == steps
    assert rows(copy) == before


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("run/steps", 240, "run/steps: 120 in the checkpoint, 240 in config.json"),
        ("optimizer/learning_rate", 0.5, "optimizer/learning_rate: 0.00"),
        ("optimizer/name", "sgd", "optimizer/name: 'adamw' in the checkpoint, 'sgd'"),
        ("cnn/widths", [4, 16], r"cnn/widths: \[4, 8\] in the checkpoint, \[4, 16\]"),
        ("run/seed", 3, "run/seed: 0 in the checkpoint, 3 in config.json"),
    ],
)
def test_an_edited_configuration_is_refused_by_field(copy, path, value, message):
    record = json.loads((copy / "config.json").read_text())
    section, field = path.split("/")
    record["config"][section][field] = value
    (copy / "config.json").write_text(json.dumps(record))
    before = rows(copy)
    with pytest.raises(CheckpointError, match=f"{message}.*Put config.json back"):
        resume(copy, QUIET)
    assert rows(copy) == before
    assert read_result(copy) is None


def test_another_text_is_refused(tmp_path, references):
    directory, text = tmp_path / "run", tmp_path / "text"
    text.write_bytes(TEXT.read_bytes())
    options = [*LM[:-2], "--steps", "10", "--text", text, "--quiet", "--save-every", "5"]
    assert fnml("train", "lm", *options, "--out", directory) == 0
    (directory / "result.json").unlink()
    shutil.rmtree(directory / "checkpoints" / "00000010")
    text.write_bytes(TEXT.read_bytes().replace(b"import", b"export"))
    with pytest.raises(DataError, match="the data has other content"):
        resume(directory, QUIET)
    text.unlink()
    with pytest.raises(DataError, match="text: No such file"):
        resume(directory, QUIET)


def test_another_environment_is_said(copy, caplog):
    record = json.loads((copy / "config.json").read_text())
    record["environment"]["jax"] = "0.0.1"
    (copy / "config.json").write_text(json.dumps(record))
    (copy / "checkpoints" / f"{newest_step(copy):08d}" / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        resume(copy, QUIET)
    assert "may not have the bits" in caplog.text and "jax was 0.0.1, is" in caplog.text


def test_a_finished_run_is_not_resumed(references):
    before = (references / "small" / "result.json").read_bytes()
    with pytest.raises(RunError, match=r"has finished \(12 steps\).*fnml eval"):
        resume(references / "small", QUIET)
    assert (references / "small" / "result.json").read_bytes() == before


def wait_for_metrics(process):
    """Read the port from what the run says, and scrape until there are numbers."""
    from prometheus_client.parser import text_string_to_metric_families as parse

    for line in process.stderr:
        if line.startswith("serving "):
            url = line.split()[1]
            break
    else:
        raise AssertionError("the run does not say where it serves metrics")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
                text = reply.read().decode()
        except urllib.error.URLError:
            assert process.poll() is None
            continue
        found = {s.name: s for family in parse(text) for s in family.samples}
        if "fnml_train_loss" in found:
            return found
        time.sleep(0.01)
    raise AssertionError("no numbers were served")


@pytest.mark.slow
def test_sigterm_saves_and_every_sink_goes_on_after_it(references, tmp_path):
    prometheus_parser = pytest.importorskip("prometheus_client.parser")
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    directory = tmp_path / "run"
    every = ["--sinks", "jsonl", "csv", "tensorboard", "prometheus", "--prometheus-port", "0"]
    with fnml_process("train", "lm", *LM, *every, "--out", directory) as process:
        scraped = wait_for_metrics(process)
        wait_until_past(process, directory, 10)
        with pytest.raises(RunError, match=f"in use by process {process.pid}"):
            resume(directory, QUIET)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    step = newest_step(directory)
    assert 10 < step < 100
    assert f"stopped by SIGTERM after step {step}; a checkpoint is saved" in out
    assert f"fnml resume {directory}" in out
    assert read_result(directory) is None

    labels = scraped["fnml_train_loss"].labels
    assert labels == {"run": "run"}
    by_step = {at: values for at, kind, values in rows(directory) if kind == "train"}
    assert scraped["fnml_train_loss"].value == by_step[scraped["fnml_steps_total"].value]["loss"]

    assert fnml("resume", directory) == 0
    check_same(directory, references / "lm")

    text = (directory / "metrics.prom").read_text()
    families = prometheus_parser.text_string_to_metric_families(text)
    found = {s.name: s.value for family in families for s in family.samples}
    last = {kind: values for _, kind, values in rows(directory)}
    assert found["fnml_steps_total"] == 100
    assert found["fnml_train_loss"] == last["train"]["loss"]
    assert found["fnml_eval_loss"] == last["eval"]["loss"]

    events = event_accumulator.EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    for kind in ("train", "eval"):
        want = [(at, v["loss"]) for at, k, v in rows(directory) if k == kind]
        got = [(event.step, event.value) for event in events.Scalars(f"{kind}/loss")]
        # The format keeps float32.
        assert got == [(at, float(np.float32(value))) for at, value in want]


@pytest.mark.slow
def test_ctrl_c_saves_and_is_no_failure(references, tmp_path):
    directory = tmp_path / "run"
    with fnml_process("train", "digits", *DIGITS, "--out", directory) as process:
        wait_until_past(process, directory, 15)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert f"stopped by SIGINT after step {newest_step(directory)}" in out
    assert read_result(directory) is None
    resume(directory, QUIET)
    check_same(directory, references / "digits")


STUCK = {"optimizer": {"learning_rate": 1e-12, "warmup": 0}, "run": {"steps": 40, "patience": 2}}


def test_a_run_that_stops_early_is_finished_and_says_why(tmp_path, capsys):
    done = start("digits", digits(**STUCK), tmp_path / "run", QUIET)
    result = read_result(tmp_path / "run")
    assert done.signal is None and done.result["params_sha256"] == result["params_sha256"]
    assert result["step"] == 15
    assert result["stopped"].startswith("accuracy is not better than")
    assert result["eval"] == [v for _, kind, v in rows(tmp_path / "run") if kind == "eval"][-1]
    assert load(tmp_path / "run").step == 15
    assert fnml("runs", tmp_path) == 0
    assert "stopped early" in capsys.readouterr().out
    with pytest.raises(RunError, match="has finished"):
        resume(tmp_path / "run", QUIET)


@pytest.mark.parametrize("before", ["its last checkpoint", "its result"])
def test_a_run_that_is_killed_as_it_stops_early(tmp_path, before):
    start("digits", digits(**STUCK), tmp_path / "run", QUIET)
    killed = shutil.copytree(tmp_path / "run", tmp_path / "killed")
    (killed / "result.json").unlink()
    if before == "its last checkpoint":
        shutil.rmtree(killed / "checkpoints" / "00000015")
    resume(killed, QUIET)
    check_same(killed, tmp_path / "run")
