"""Run one framework's side of one row, whenever it is asked.

Run: ``python worker.py MODULE ROW VARIANT``. It builds the row, says what that cost, then answers each
line "N" on its input with the seconds that N steps took, and "end" with its peak memory.
"""

import importlib
import json
import os
import resource
import sys
import time
from itertools import cycle, islice
from pathlib import Path

import problems


def _peak_mib() -> float:
    """Return the most memory that this process has held at once, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _say(**values: object) -> None:
    print(json.dumps(values), flush=True)


def main() -> None:
    module, row, variant = sys.argv[1:]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    sys.path.insert(1, str(Path(__file__).parents[1]))
    framework = importlib.import_module(module)
    problem = getattr(problems, row)()
    state, step = getattr(framework, row)(problem, variant)
    batches = cycle(framework.on_device(problem.batches))
    began = time.perf_counter()
    state, loss = step(state, next(batches))
    first = framework.value(loss)
    compiled = time.perf_counter() - began
    for batch in islice(batches, problem.checked - 1):
        state, loss = step(state, batch)
    _say(
        versions=framework.versions(),
        first_step_s=compiled,
        first_loss=first,
        loss=framework.value(loss),
        flops=problem.flops,
    )
    for line in sys.stdin:
        if line.strip() == "end":
            break
        steps = int(line)
        began = time.perf_counter()
        for batch in islice(batches, steps):
            state, loss = step(state, batch)
        last = framework.value(loss)
        _say(seconds=(time.perf_counter() - began) / steps, loss=last)
    _say(peak_mib=_peak_mib())


if __name__ == "__main__":
    main()
