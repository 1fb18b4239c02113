"""Run a script with one CPU and with two: what it prints must not depend on the threads."""

import os
import subprocess
import sys
from pathlib import Path


def printed_with_one_and_two(script: str) -> tuple[str, str]:
    """Return what ``script`` prints in a process of its own with one CPU, and with two; or skip."""
    import pytest

    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("CPUs cannot be chosen here")
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("one CPU only")

    def printed(some: list[int]) -> str:
        pin = f"import os; os.sched_setaffinity(0, {some!r})\n"
        keep = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        done = subprocess.run(
            [sys.executable, "-c", pin + script],
            capture_output=True,
            text=True,
            check=True,
            env=keep | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )
        return done.stdout.strip()

    return printed(cpus[:1]), printed(cpus[:2])
