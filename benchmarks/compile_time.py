"""How long do fnml's training steps take to compile, beside the same models in textbook form?

Run: ``python benchmarks/compile_time.py [--rows cnn,resnet]`` (about six minutes). The models and
batches are those of ``peers.py``. Each contestant compiles one row's step in a fresh process, without
a cache, and they take turns: fnml, fnml within ``transforms.native``, the model in plain jnp and lax
(``peers/plain_rows.py``), and flax.linen where ``FNML_PEERS_PYTHON`` names a Python that has it. Ratios
are to plain jnp within a round; that of the CPU time, over all threads, other work on the machine
disturbs less. Target: at most 1.3.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

PEERS = Path(__file__).parent / "peers"


class Contestant(NamedTuple):
    """Who compiles: a module in ``peers``, its variant, and its interpreter."""

    module: str
    variant: str = ""
    python: str | None = sys.executable


CONTESTANTS = {
    "plain jnp": Contestant("plain_rows"),
    "fnml": Contestant("fnml_rows"),
    "fnml, native": Contestant("fnml_rows", "native"),
    "flax.linen": Contestant("linen_rows", python=os.environ.get("FNML_PEERS_PYTHON")),
}


class Times(NamedTuple):
    """Seconds that one process took to trace and lower, and to compile; CPU seconds of both."""

    lower: float
    compile: float
    cpu: float

    @property
    def whole(self) -> float:
        return self.lower + self.compile


def compile_row(module: str, row: str, variant: str) -> Times:
    """Compile one step in this process."""
    import importlib
    import time

    sys.path.insert(0, str(PEERS))
    import jax
    import problems

    framework = importlib.import_module(module)
    problem = getattr(problems, row)()
    state, step = getattr(framework, row)(problem, variant)
    (batch,) = framework.on_device(problem.batches[:1])
    # What JAX does once in a process is nobody's.
    jax.jit(lambda x: x + 1).lower(1.0).compile()
    began, cpu = time.perf_counter(), time.process_time()
    lowered = (step if hasattr(step, "lower") else jax.jit(step)).lower(state, batch)
    between = time.perf_counter()
    lowered.compile()
    ended = time.perf_counter()
    return Times(between - began, ended - between, time.process_time() - cpu)


def measure(contestant: Contestant, row: str) -> Times:
    """Compile one step in a fresh process."""
    settings = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    code = [__file__, "--one", contestant.module, row, contestant.variant]
    out = subprocess.run(
        [str(contestant.python), *code],
        check=True,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        text=True,
    )
    return Times(*json.loads(out.stdout.splitlines()[-1]))


def main() -> None:
    """Measure and print one table."""
    from peers import ROWS
    from report import report
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=",".join(ROWS), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the table and the machine")
    options = parser.parse_args()
    rows = options.rows.split(",")
    if not {*rows} <= {*ROWS}:
        parser.error(f"no rows {', '.join({*rows} - {*ROWS})}; there are {', '.join(ROWS)}")
    contestants = {name: x for name, x in CONTESTANTS.items() if x.python}
    table = Table(
        "step",
        "contestant",
        "trace and lower, s",
        "compile, s",
        "both, lowest",
        "highest",
        "ratio",
        "ratio of CPU time",
    )
    for row in rows:
        turns = []
        for turn in range(options.rounds):
            print(f"{row}: round {turn + 1}", file=sys.stderr)
            order = list(contestants)[:: 1 if turn % 2 else -1]
            turns.append({name: measure(contestants[name], row) for name in order})
        for name in contestants:
            times = [turn[name] for turn in turns]
            whole = [x.whole for x in times]
            pairs = [(turn[name], turn["plain jnp"]) for turn in turns]
            cells = [
                statistics.median(x.lower for x in times),
                statistics.median(x.compile for x in times),
                min(whole),
                max(whole),
                statistics.median(x.whole / plain.whole for x, plain in pairs),
                statistics.median(x.cpu / plain.cpu for x, plain in pairs),
            ]
            table.add_row(row, name, *[f"{x:.2f}" for x in cells])
    report({f"Compiling a step ({options.rounds} rounds)": table}, options.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(compile_row(sys.argv[2], sys.argv[3], sys.argv[4])))
    else:
        main()
