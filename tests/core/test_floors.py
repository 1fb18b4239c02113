"""Imports go down the floors only, and every part of fnml lives on one."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fnml

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"

pytest.importorskip("importlinter")


def lint(config, directory):
    return subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache", "--config", config],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_contracts_hold(tmp_path):
    run = lint(PROJECT, tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 broken" in run.stdout


def test_a_contract_that_is_broken_is_noticed(tmp_path):
    config = tmp_path / "upside_down.toml"
    config.write_text(
        '[tool.importlinter]\nroot_package = "fnml"\n'
        '[[tool.importlinter.contracts]]\nname = "upside down"\ntype = "layers"\n'
        'layers = ["fnml.core", "fnml.sinks"]\n'
    )
    run = lint(config, tmp_path)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "fnml.sinks._jsonl -> fnml.core" in run.stdout


def test_every_package_is_on_a_floor():
    tool = tomllib.loads(PROJECT.read_text())["tool"]["importlinter"]
    (floors,) = (contract for contract in tool["contracts"] if contract["type"] == "layers")
    named = {name.strip() for layer in floors["layers"] for name in layer.split("|")}
    (root,) = fnml.__path__
    present = {f"fnml.{path.parent.name}" for path in Path(root).glob("*/__init__.py")}
    assert "fnml.core" in present
    assert present <= named
