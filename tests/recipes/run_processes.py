"""Runs in this process and in others, to be killed, and what they leave behind."""

import contextlib
import csv
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fnml import recipes
from fnml.cli import main
from fnml.recipes import Output, find_recipe, from_json, read_result
from fnml.sinks import read_jsonl

TEXT = Path(recipes.__file__).with_name("_run.py")

DIGITS = [
    *["--network", "cnn", "--cnn.widths", "4", "8", "--batch-size", "32", "--fuse", "5"],
    *["--log-every", "4", "--eval-every", "40", "--save-every", "15", "--keep-last", "3"],
    *["--steps", "120", "--warmup", "10"],
]
LM = [
    *["--width", "32", "--layers", "1", "--heads", "2", "--context", "32", "--dropout", "0.2"],
    *["--batch-size", "4", "--accumulate", "2", "--no-keep-memory", "--text", str(TEXT)],
    *["--log-every", "7", "--eval-every", "20", "--save-every", "10", "--steps", "100"],
]


QUIET = Output(quiet=True)
SMALL = {
    "network": "mlp",
    "mlp": {"inputs": 64, "hidden": [16], "outputs": 10},
    "run": {"steps": 12, "batch_size": 32, "fuse": 4, "save_every": 5, "eval_every": 5},
}


def fnml(*arguments):
    """Run the command line in this process; return its exit code."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def digits(**fields):
    run = {**SMALL["run"], **fields.pop("run", {})}
    return from_json(find_recipe("digits").config, {**SMALL, **fields, "run": run})


def sha256(directory):
    return read_result(directory)["params_sha256"]


@contextlib.contextmanager
def fnml_process(*arguments, cwd=None):
    """Start ``fnml``; it does not outlive the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fnml", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def newest_step(directory):
    names = [path.name for path in (directory / "checkpoints").glob("[0-9]*")]
    return max(map(int, names), default=0)


def rows(directory):
    """Return the rows of a run without their timing."""
    path = directory / "metrics.jsonl"
    found = read_jsonl(path) if path.exists() else []
    return [(row.step, row.kind, dict(row.values)) for row in found]


def table(directory):
    """Return the run's CSV without its timing."""
    with (directory / "metrics.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if not name.startswith("time/")}
            for row in csv.DictReader(file)
        ]


def wait_until_past(process, directory, step):
    """Wait for a checkpoint of at least ``step``, and rows of steps after the newest one."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        newest = newest_step(directory)
        if newest >= step and rows(directory)[-1][0] > newest:
            return
        time.sleep(0.002)
    raise AssertionError(f"no checkpoint of step {step}: {process.communicate()}")
