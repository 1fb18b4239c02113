"""``fnml verify crash``: what it finds where something differs, and a plugin's run that it kills.

The plugin's loss counts what it learns from: each row of metrics holds sums over the numbers of the
examples in that step's batch, computed inside the step, so that the rows themselves say that none
was seen twice or skipped.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from fnml.checkpoint import Checkpointer, restore
from fnml.cli import _crash, main
from fnml.cli._crash import Reference, Report
from fnml.cli._crash_watch import MOMENTS, Ended, Spans
from fnml.data import ArraySource, Batches
from fnml.recipes import Output, find_recipe, from_json, start
from fnml.sinks import read_jsonl

STEPS, BATCH, COUNT = 60, 8, 50
CODE = f'''
"""Fit a line, and count."""

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from fnml import Mean, Metrics, Model, Param
from fnml.data import ArraySource, Batches, epoch
from fnml.recipes import FLAT, Recipe, RunConfig, Task
from fnml.train import OptimizerConfig, mse


@dataclass(frozen=True)
class CountedConfig:
    """Fit a line through noisy points."""

    run: Annotated[RunConfig, FLAT] = RunConfig(
        steps={STEPS}, batch_size={BATCH}, fuse=3, log_every=1, eval_every=20, save_every=4
    )
    """How the run goes."""
    optimizer: Annotated[OptimizerConfig, FLAT] = OptimizerConfig(learning_rate=0.1, warmup=0)
    """How parameters are updated."""


def build(config, directory):
    number = np.arange({COUNT}, dtype=np.float32)
    source = ArraySource({{"number": number, "x": number / {COUNT}}})
    spec = {{"slope": Param((), (), jax.nn.initializers.zeros)}}
    model = Model(spec, lambda params, x: params["slope"] * x)

    def loss_fn(params, batch, key):
        error = mse(model.apply(params, batch["x"]), 3 * batch["x"], weights=batch.get("mask"))
        place = jnp.arange(1, len(batch["number"]) + 1, dtype=jnp.float32)
        one = jnp.ones((), jnp.float32)
        numbers = Mean(jnp.sum(batch["number"]), one)
        places = Mean(jnp.sum(batch["number"] * place), one)
        return error.value, Metrics(error.weight, {{"numbers": numbers, "places": places}})

    return Task(
        model=model,
        loss_fn=loss_fn,
        eval_loss_fn=loss_fn,
        train=Batches(source, config.run.batch_size, seed=config.run.seed),
        held_out=lambda: epoch(source, {COUNT}),
        best=("loss", "min"),
        sample=lambda params, state, options: "",
    )


counted = Recipe(CountedConfig, build)
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    root = tmp_path_factory.mktemp("packages")
    (root / "counting.py").write_text(textwrap.dedent(CODE))
    info = root / "counting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: counting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fnml.recipes]\ncounted = counting:counted\n")
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path}


def test_a_plugins_run_survives_kills_and_sees_every_example_once(installed, tmp_path):
    out = tmp_path / "runs"
    done = subprocess.run(
        [
            *[sys.executable, "-m", "fnml", "verify", "crash", "counted"],
            *["--kills", "3", "--seed", "0", "--out", str(out), "--", "--seed", "5"],
        ],
        env=installed,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    killed = sorted(path for path in out.iterdir() if path.is_dir())
    assert [path.name for path in killed] == [
        *(f"killed-{i}" for i in range(1, len(killed))),
        "whole",
    ]
    assert (
        f"3 kills, 0 with faults; {len(killed) - 1} of {len(killed) - 1} runs ended" in done.stdout
    )
    for moment in MOMENTS[:3]:
        assert moment.name in done.stdout

    # What each step has to learn from, without any of the machinery that ran it.
    source = ArraySource({"number": np.arange(COUNT, dtype=np.float32)})
    expected = Batches(source, BATCH, seed=5)
    stream = np.concatenate([expected.at(step * BATCH)["number"] for step in range(STEPS)])
    for begin in range(0, len(stream) - COUNT, COUNT):
        assert sorted(stream[begin : begin + COUNT].tolist()) == list(range(COUNT))
    batches = stream.reshape(STEPS, BATCH)
    for directory in killed:
        rows = [row for row in read_jsonl(directory / "metrics.jsonl") if row.kind == "train"]
        assert [row.step for row in rows] == list(range(1, STEPS + 1))
        numbers = [row.values["numbers"] for row in rows]
        places = [row.values["places"] for row in rows]
        np.testing.assert_array_equal(numbers, batches.sum(axis=1))
        np.testing.assert_array_equal(places, batches @ np.arange(1, BATCH + 1))


SMALL = {
    "network": "mlp",
    "mlp": {"inputs": 64, "hidden": [8], "outputs": 10},
    "run": {"steps": 8, "batch_size": 16, "save_every": 4, "log_every": 2, "eval_every": 4},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("crash") / "whole"
    config = from_json(find_recipe("digits").config, SMALL)
    start("digits", config, directory, Output(quiet=True))
    return directory


@pytest.fixture
def reference(whole):
    return Reference(whole, Spans(1.0, 1.0, 1.0, 1.0, 1.0))


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "killed-1")


def examine(run, reference, code=-9, moment=MOMENTS[0]):
    run.with_suffix(".log").write_text("")
    return _crash._examine(run, moment, Ended(code, 1.0, True), Report("x"), reference)


def unfinished(run):
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "00000008")


def test_an_unharmed_run_has_no_faults(run, reference):
    assert _crash._differences(run, reference) == []
    kill = examine(run, reference)
    assert (kill.step, kill.state, kill.faults, kill.found) == (8, "same", (), "finished")
    unfinished(run)
    kill = examine(run, reference)
    assert (kill.step, kill.state, kill.faults) == (4, "same", ())
    assert kill.found == "rows to step 8"


def test_other_bits_are_a_fault(run, reference):
    path = run / "result.json"
    path.write_text(path.read_text().replace(reference.result["params_sha256"], "0" * 64))
    assert any("params_sha256 is '000" in fault for fault in _crash._differences(run, reference))
    unfinished(run)
    step = run / "checkpoints" / "00000004"
    found = restore(run / "checkpoints")
    found.state["params/head/bias"] = found.state["params/head/bias"] + np.float32(1)
    shutil.rmtree(step)
    with Checkpointer(run / "checkpoints") as keeper:
        keeper.save(4, found.state, {**found.meta, "data": {"position": 63}})
    assert examine(run, reference).faults == (
        "the state of step 4 has other bits",
        "63 examples are counted after step 4",
    )


def test_a_torn_step_is_a_fault(run, reference):
    unfinished(run)
    (run / "checkpoints" / "00000004" / "meta.json").write_bytes(b"")
    assert "step 4: meta.json has 0 bytes" in examine(run, reference).faults[0]


def test_rows_missing_repeated_or_changed_are_faults(run, reference):
    unfinished(run)
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0])
    assert "metrics.jsonl lacks rows up to step 4: 1 of 3" in examine(run, reference).faults
    path.write_text("".join([lines[0], *lines]))
    assert "metrics.jsonl has other rows" in examine(run, reference).faults
    row = json.loads(lines[1])
    path.write_text("".join([lines[0], json.dumps({**row, "loss": row["loss"] + 1}) + "\n"]))
    assert "metrics.jsonl has other rows" in examine(run, reference).faults


def test_leftovers_and_odd_exits_are_faults(run, reference):
    (run / ".metrics.csv.123.tmp").write_text("")
    assert "left behind: .metrics.csv.123.tmp" in _crash._differences(run, reference)
    assert "exit code 1" in examine(run, reference, code=1).faults[0]
    term = next(moment for moment in MOMENTS if moment.name.startswith("SIGTERM"))
    assert examine(run, reference, code=143, moment=term).faults == ()
    assert "exit code -9 after SIGTERM" in examine(run, reference, code=-9, moment=term).faults[0]


def test_wrong_use_is_refused(tmp_path, capsys):
    def fails(*arguments):
        with pytest.raises(SystemExit) as caught:
            main(["verify", "crash", *arguments])
        return caught.value.code, capsys.readouterr().err

    assert fails("digist")[0] == 1
    assert "--kills of at least 1" in fails("digits", "--kills", "0")[1]
    assert "not the recipe's to set" in fails("digits", "--keep-last", "3")[1]
    (tmp_path / "file").write_text("")
    assert "is not empty" in fails("digits", "--out", str(tmp_path))[1]
    assert Path(tmp_path / "file").exists()
