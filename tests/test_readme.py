"""What the README shows is what happens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="the installed wheel has no README")


def block(name: str) -> str:
    """Return the code between the README's markers."""
    found = re.search(
        rf"<!-- {name} -->\n```\w+\n(.*?)```\n<!-- /{name} -->", README.read_text(), re.DOTALL
    )
    assert found, f"README.md has no block {name!r}"
    return found[1]


def test_the_example_runs_and_learns() -> None:
    # A process of its own: users have neither the tests' strictness nor their devices.
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block("example") + "\nprint(run.row.values)"],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout


def test_the_example_is_short() -> None:
    assert len([line for line in block("example").splitlines() if line.strip()]) <= 21


@pytest.mark.parametrize("name", ["run", "test"])
def test_each_command_is_one_line_that_starts_from_nothing(name: str) -> None:
    (line,) = block(name).splitlines()
    assert line.startswith("python3 -m venv .venv && .venv/bin/pip install")
