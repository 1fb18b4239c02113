"""A package that brings a recipe and a sink of its own, and one that is broken."""

import json
import os
import re
import subprocess
import sys
import textwrap

import pytest

CODE = '''
"""Fit a line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from fnml import Mean, Metrics, Model, Param
from fnml.data import ArraySource, Batches, epoch
from fnml.recipes import FLAT, Recipe, RunConfig, Task
from fnml.train import OptimizerConfig, mse


@dataclass(frozen=True)
class LineConfig:
    """Fit a line through noisy points."""

    run: Annotated[RunConfig, FLAT] = RunConfig(steps=30, batch_size=8, log_every=10)
    """How the run goes."""
    optimizer: Annotated[OptimizerConfig, FLAT] = OptimizerConfig(learning_rate=0.3, warmup=0)
    """How parameters are updated."""
    slope: float = 2.0
    """The slope that the points have."""


def build(config, directory):
    x = np.linspace(-1, 1, 64, dtype=np.float32)
    source = ArraySource({"x": x, "y": config.slope * x + 1})
    zeros = jax.nn.initializers.zeros
    spec = {"slope": Param((), (), zeros), "height": Param((), (), zeros)}
    model = Model(spec, lambda params, x: params["slope"] * x + params["height"])

    def loss_fn(params, batch, key):
        error = mse(model.apply(params, batch["x"]), batch["y"], weights=batch.get("mask"))
        return error.value, Metrics(error.weight)

    return Task(
        model=model,
        loss_fn=loss_fn,
        eval_loss_fn=loss_fn,
        train=Batches(source, config.run.batch_size, seed=config.run.seed),
        held_out=lambda: epoch(source, 32),
        best=("loss", "min"),
        sample=lambda params, state, options: f"y = {params['slope']:.3f} x + {params['height']:.3f}",
    )


line = Recipe(LineConfig, build)
not_a_recipe = 3


class Diary:
    """Write each row on a line of its own."""

    def __init__(self, directory: Path, after: int | None):
        self._file = (directory / "diary.txt").open("a")
        print("after", after, file=self._file)

    def write(self, row):
        print(row.kind, row.step, row.values["loss"], file=self._file)

    def flush(self):
        self._file.flush()

    def close(self):
        self._file.close()
'''


def package(root, name, code, entry_points):
    """Lay a package out as an installed one is: a module, and its metadata beside it."""
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{name}.py").write_text(code)
    info = root / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(textwrap.dedent(entry_points))


def fnml(*arguments, path, cwd):
    path = [str(entry) for entry in path] + sys.path
    done = subprocess.run(
        [sys.executable, "-m", "fnml", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "COLUMNS": "300"},
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    entry_points = """
        [fnml.recipes]
        line = fnml_line:line

        [fnml.sinks]
        diary = fnml_line:Diary
    """
    package(root, "fnml_line", CODE, entry_points)
    return root


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    root = tmp_path_factory.mktemp("broken")
    entry_points = """
        [fnml.recipes]
        torn = fnml_broken:line
        gone = fnml_nowhere:line
        leaves = fnml_leaves:line
        number = fnml_number:three
        garbled = ???

        [fnml.sinks]
        lost = fnml_broken:Sink
    """
    package(root, "fnml_broken", "raise ValueError('out of paper')", entry_points)
    (root / "fnml_leaves.py").write_text("raise SystemExit(7)")
    (root / "fnml_number.py").write_text("three = 3")
    return root


@pytest.fixture(scope="module")
def trained(good, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("run")
    done = fnml(
        *["train", "line", "--slope", "3", "--eval-every", "15", "--out", "run"],
        *["--sinks", "jsonl", "diary"],
        path=[good],
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    return cwd


def states(out):
    """Return the table of plugins as ``{name: (group, package, state)}``."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    return {row[1]: (row[0], row[2], row[4]) for row in rows if len(row) == 5}


def test_plugins_are_listed_with_their_package(good, tmp_path):
    done = fnml("plugins", path=[good], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    found = states(done.stdout)
    assert found["line"] == ("fnml.recipes", "fnml_line", "fine")
    assert found["diary"] == ("fnml.sinks", "fnml_line", "fine")


def test_a_plugins_recipe_has_a_place_in_the_help(good, tmp_path):
    done = fnml("train", "--help", path=[good], cwd=tmp_path)
    assert "  line      Fit a line through noisy points.\n" in done.stdout
    done = fnml("train", "line", "--help", path=[good], cwd=tmp_path)
    assert done.returncode == 0
    assert re.search(
        r"--slope FLOAT +The slope that the points have. \(default: 2.0\)", done.stdout
    )
    done = fnml("train", "lien", path=[good], cwd=tmp_path)
    assert done.returncode == 1
    assert "Did you mean 'line'? There are: digits, lm, finetune, line" in done.stderr


def test_a_plugins_recipe_trains_and_its_sink_gets_every_row(trained):
    rows = [
        json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    diary = (trained / "run" / "diary.txt").read_text().splitlines()
    assert diary[0] == "after None"
    assert diary[1:] == [f"{row['kind']} {row['step']} {row['loss']!r}" for row in rows]
    assert [row["step"] for row in rows] == [10, 15, 20, 30, 30]
    # It begins at zero, where the error is 4.1.
    assert rows[-1]["loss"] < 1


def test_a_plugins_run_can_be_used_and_resumed(trained, good):
    done = fnml("sample", "run", path=[good], cwd=trained)
    assert done.stdout.startswith("y = ")
    done = fnml("resume", "run", path=[good], cwd=trained)
    assert done.returncode == 1 and "has finished" in done.stderr
    (trained / "run" / "result.json").rename(trained / "result.json")
    for path in sorted((trained / "run" / "checkpoints").glob("*30")):
        path.rename(trained / path.name)
    done = fnml("resume", "run", path=[good], cwd=trained)
    assert done.returncode == 0, done.stderr
    before, after = (
        json.loads((trained / path / "result.json").read_text())["params_sha256"]
        for path in (".", "run")
    )
    assert before == after
    assert "after 0" not in (trained / "run" / "diary.txt").read_text()


def test_without_its_package_the_run_says_what_is_missing(trained):
    for command in ("eval", "resume"):
        done = fnml(command, "run", path=[], cwd=trained)
        assert done.returncode == 1
    assert "has finished" in done.stderr
    done = fnml("eval", "run", path=[], cwd=trained)
    assert "there is no recipe 'line'." in done.stderr


def test_a_broken_plugin_is_reported(broken, good, tmp_path):
    done = fnml("plugins", path=[broken, good], cwd=tmp_path)
    assert done.returncode == 1
    found = states(done.stdout)
    assert "fails to import: ValueError: out of paper" in found["torn"][2]
    assert (
        "fails to import: ModuleNotFoundError: No module named 'fnml_nowhere'" in found["gone"][2]
    )
    assert "fails to import: SystemExit: 7" in found["leaves"][2]
    assert "is a int, expected a Recipe" in found["number"][2]
    assert "fails to import" in found["garbled"][2]
    assert "fails to import: ValueError: out of paper" in found["lost"][2]
    assert found["line"][2] == "fine"


def test_a_broken_plugin_stops_nothing_else(broken, good, tmp_path):
    done = fnml("train", "--help", path=[broken, good], cwd=tmp_path)
    assert done.returncode == 0
    assert "  torn      (cannot be used: " in done.stdout
    assert "  digits    Classify" in done.stdout and "  line      Fit a line" in done.stdout
    done = fnml("train", "line", "--steps", "2", "--out", "run", path=[broken, good], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_broken_plugin_that_is_asked_for_is_named(broken, tmp_path):
    done = fnml("train", "torn", path=[broken], cwd=tmp_path)
    assert done.returncode == 1
    assert "the plugin 'torn' in fnml.recipes (fnml_broken:line) fails to import" in done.stderr
    options = ["train", "digits", "--network", "mlp", "--out", "run", "--sinks", "lost"]
    done = fnml(*options, path=[broken], cwd=tmp_path)
    assert done.returncode == 1
    assert "the plugin 'lost' in fnml.sinks" in done.stderr
    assert not (tmp_path / "run").exists()


def test_two_packages_with_one_name_are_ambiguous(good, tmp_path):
    package(tmp_path / "two", "fnml_other", CODE, "[fnml.recipes]\nline = fnml_other:line\n")
    done = fnml("train", "line", path=[good, tmp_path / "two"], cwd=tmp_path)
    assert done.returncode == 1
    assert "'line' in fnml.recipes is ambiguous" in done.stderr
    assert "fnml_line:line of fnml_line" in done.stderr
    assert "fnml_other:line of fnml_other" in done.stderr
