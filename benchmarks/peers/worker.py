"""Run one framework's side of one row, whenever it is asked.

Run: ``python worker.py MODULE ROW VARIANT``. It builds the row, says what that cost, then answers each
line "N" on its input with the seconds that each of N steps took, and "end" with its peak memory.
"""

import importlib
import json
import os
import resource
import sys
import time
from itertools import cycle, islice
from math import lcm
from pathlib import Path

import numpy as np
import problems


def _peak_mib() -> float:
    """Return the most memory that this process has held at once, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _blocks(batches: list, count: int) -> list:
    """Stack each ``count`` batches that follow on each other, around until they come out even."""
    if count == 1:
        return batches
    row = [batches[i % len(batches)] for i in range(lcm(len(batches), count))]
    return [
        tuple(np.stack(arrays) for arrays in zip(*row[i : i + count], strict=True))
        for i in range(0, len(row), count)
    ]


def _start_with(variables: dict[str, str]) -> None:
    """Start anew with environment variables that a process only reads at its start."""
    if not variables.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | variables)


def _say(**values: object) -> None:
    print(json.dumps(values), flush=True)


def main() -> None:
    module, row, variant = sys.argv[1:]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    sys.path.insert(1, str(Path(__file__).parents[1]))
    framework = importlib.import_module(module)
    if hasattr(framework, "environment"):
        _start_with(framework.environment(row, variant))
    problem = getattr(problems, row)()
    state, step = getattr(framework, row)(problem, variant)
    # How many steps a call takes.
    count = framework.steps_per_call(variant) if hasattr(framework, "steps_per_call") else 1
    batches = cycle(framework.on_device(_blocks(problem.batches, count)))
    began = time.perf_counter()
    state, loss = step(state, next(batches))
    framework.value(loss)
    compiled = time.perf_counter() - began
    for batch in islice(batches, problem.checked // count - 1):
        state, loss = step(state, batch)
    _say(
        versions=framework.versions(),
        first_step_s=compiled,
        loss=framework.value(loss),
        flops=problem.flops,
    )
    for line in sys.stdin:
        if line.strip() == "end":
            break
        calls = -(-int(line) // count)
        began = time.perf_counter()
        for batch in islice(batches, calls):
            state, loss = step(state, batch)
        last = framework.value(loss)
        _say(seconds=(time.perf_counter() - began) / (calls * count), loss=last)
    _say(peak_mib=_peak_mib())


if __name__ == "__main__":
    main()
