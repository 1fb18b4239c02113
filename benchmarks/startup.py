"""How long does a process take to import fnml, and to its first training step?

Run: ``python benchmarks/startup.py`` (about two minutes). Fresh processes take turns. The first step
is that of ``fnml train digits``, in a cache folder of its own: once without compiled programs, then
with those of the first run. Ratios are to ``import jax`` within a round. All modules have their
bytecode, as pip makes it for what it installs. Targets: importing at most 1.2 times ``import jax``;
the first step with a warm cache at most 3 times.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import report
from rich.table import Table

# Ends the process when the first dispatch is done, and says how long the work before took.
FIRST_STEP = """
import os, sys, jax
from fnml.cli import main
from fnml.train import _logbook
def record(self, packed, steps=None):
    jax.block_until_ready(packed)
    os._exit(0)
_logbook.Logbook.record = record
main(["train", "digits", "--fuse", "1", "--quiet", "--out", sys.argv[1]])
"""


def seconds(code: str, cache: Path | None = None) -> float:
    """Time a fresh interpreter that runs ``code``."""
    environment = {**os.environ, "FNML_CACHE_DIR": "off" if cache is None else str(cache)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    # Without it a checkout would be compiled at every start, and jax, from its wheel, not.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", code, str(Path(folder, "run"))]
        began = time.perf_counter()
        subprocess.run(command, check=True, env=environment)
        return time.perf_counter() - began


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write the table and the machine")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds(FIRST_STEP, Path(folder, "unused"))  # writes the bytecode
        cache = Path(folder, "cache")
        cold = seconds(FIRST_STEP, cache)
        processes = {
            "import jax": lambda: seconds("import jax"),
            "import fnml": lambda: seconds("import fnml"),
            "import optax": lambda: seconds("import optax"),
            "fnml train digits, first step, warm cache": lambda: seconds(FIRST_STEP, cache),
        }
        turns = [{name: run() for name, run in processes.items()} for _ in range(options.rounds)]
    table = Table("process", "median s", "lowest", "highest", "times import jax")
    for name in processes:
        times = [turn[name] for turn in turns]
        ratio = statistics.median(turn[name] / turn["import jax"] for turn in turns)
        cells = [statistics.median(times), min(times), max(times), ratio]
        table.add_row(name, *[f"{x:.2f}" for x in cells])
    jax = statistics.median(turn["import jax"] for turn in turns)
    label = "fnml train digits, first step, empty cache (once)"
    table.add_row(label, f"{cold:.2f}", "", "", f"{cold / jax:.2f}")
    report({f"From the start of a process ({options.rounds} rounds)": table}, options.json)


if __name__ == "__main__":
    main()
