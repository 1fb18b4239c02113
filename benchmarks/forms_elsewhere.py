"""What do the real compilers for TPUs and GPUs make of fnml's forms, beside the textbook's?

Run: ``python benchmarks/forms_elsewhere.py [--targets v5e:1x1 h200:1x1] [--full] [--json FILE]`` with
``FNML_TPU_PYTHON`` and ``FNML_CUDA_PYTHON`` set. No device is needed. Each row is one program
(``benchmarks/forms/rows.py``), compiled in fnml's form and as a textbook writes it
(``benchmarks/forms/textbook.py``), with the same parameters and loss. First both forms of the small
rows are run on the CPU, and the script stops if they differ. Cells are fnml's figure and how many times the textbook's it
is; FLOPs are those of products, bytes what passes through main memory, both counted in the optimised
program; "bytes by XLA" is the TPU compiler's own account, memory on the chip included.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from report import report
from rich.table import Table

from fnml import core
from fnml.plan import parse_target
from fnml.plan._worker import environment

HERE = Path(__file__).parent
sys.path.append(str(HERE / "forms"))
import rows as all_rows

COLUMNS = {
    "flops": ("GFLOP", 1e9),
    "bytes": ("MB", 1e6),
    "xla": ("MB by XLA", 1e6),
    "temporaries": ("temporaries, MB", 1e6),
    "calls": ("operations", 1),
}


def difference(row: all_rows.Row) -> float:
    """Return the largest relative distance between the two forms' results on the CPU, by array."""
    params = core.init(row.spec, jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = [
        jnp.asarray(
            rng.integers(0, row.below, x.shape)
            if x.dtype == jnp.int32
            else rng.normal(size=x.shape),
            x.dtype,
        )
        for x in row.batch
    ]
    got, want = (jax.tree.leaves(jax.jit(f)(params, *batch)) for f in (row.ours, row.textbook))
    distances = [
        np.linalg.norm(np.ravel(a - b)) / max(np.linalg.norm(np.ravel(b)), 1e-6)
        for a, b in zip(got, want, strict=True)
    ]
    return float(max(distances))


def compile_for(target: str, sizes: str) -> dict[str, Any]:
    """Let the Python with a target's compiler compile all rows."""
    platform = parse_target(target).chip.platform
    variable = {"tpu": "FNML_TPU_PYTHON", "cuda": "FNML_CUDA_PYTHON"}[platform]
    if variable not in os.environ:
        raise SystemExit(f"{target}: {variable} names no Python with its compiler")
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [os.environ[variable], str(HERE / "forms" / "worker.py"), target, sizes],
        env=keep | environment(platform) | {"PYTHONPATH": str(HERE.parent)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def cell(ours: float | None, plain: float | None, unit: float) -> str:
    """Show fnml's figure and its ratio to the textbook's."""
    if ours is None or plain is None:
        return ""
    shown = f"{ours / unit:,.0f}" if unit == 1 else f"{ours / unit:.4g}"
    return f"{shown} ({ours / plain:.2f})" if plain else shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", default=["v5e:1x1", "h200:1x1"])
    parser.add_argument("--full", action="store_true", help="larger sizes; minutes for each row")
    parser.add_argument("--json", type=Path, help="where to write all of it")
    options = parser.parse_args()
    sizes = "full" if options.full else "small"
    for name, row in all_rows.small().items():
        if (found := difference(row)) > row.tolerance:
            raise SystemExit(f"{name}: on the CPU the forms differ by {found:.1e}")
        print(f"{name}: on the CPU the forms differ by {found:.1e}", file=sys.stderr, flush=True)
    tables = {}
    for target in options.targets:
        table = Table("program", *(name for name, _ in COLUMNS.values()))
        for name, found in compile_for(target, sizes).items():
            pairs = [(found["fnml"][key], found["textbook"][key]) for key in COLUMNS]
            units = [unit for _, unit in COLUMNS.values()]
            label = f"{name} (a kernel)" if found["fnml"]["kernels"] else name
            table.add_row(label, *(cell(*p, u) for p, u in zip(pairs, units, strict=True)))
        tables[f"{target}, fnml (beside the textbook's form)"] = table
    report(tables, options.json)


if __name__ == "__main__":
    main()
