"""What does ``import fnml`` cost beside ``import jax``?

Run: ``python benchmarks/import_time.py``. Fresh processes take turns; the table shows medians.
Target: at most 1.2 times ``import jax``.
"""

import argparse
import statistics
import subprocess
import sys
import time

from rich import print
from rich.table import Table


def seconds(code: str) -> float:
    """Time a fresh interpreter that runs ``code``."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    codes = {"import jax": "import jax", "import fnml": "import fnml", "nothing": "pass"}
    for code in codes.values():
        seconds(code)
    turns = [{name: seconds(code) for name, code in codes.items()} for _ in range(rounds)]
    base = statistics.median(turn["import jax"] - turn["nothing"] for turn in turns)
    table = Table("process", "median seconds", "ratio to import jax, interpreter taken out")
    for name in codes:
        median = statistics.median(turn[name] for turn in turns)
        own = statistics.median(turn[name] - turn["nothing"] for turn in turns)
        table.add_row(name, f"{median:.3f}", f"{own / base:.3f}")
    print(table)


if __name__ == "__main__":
    main()
