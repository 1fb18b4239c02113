"""Show a benchmark's tables, and write them with the machine they were measured on."""

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

from rich import print
from rich.table import Table

_PACKAGES = ("fnml", "jax", "jaxlib", "numpy", "optax", "onnxruntime", "orbax-checkpoint", "torch")


def machine() -> dict[str, str]:
    """Say what a benchmark ran on: processor, CPUs, versions."""
    lines = []
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "processor": names[0] if names else platform.processor(),
        "cpus": str(cpus),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def report(tables: dict[str, Table], json_path: Path | None) -> None:
    """Print tables under their titles; write them as JSON, where a path is given."""
    for title, table in tables.items():
        print(title)
        print(table)
    if json_path is None:
        return
    content = {
        "command": " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *_arguments()]),
        "machine": machine(),
        "tables": [
            {
                "title": title,
                "columns": [str(column.header) for column in table.columns],
                "rows": [list(row) for row in zip(*(c.cells for c in table.columns), strict=True)],
            }
            for title, table in tables.items()
        ],
    }
    json_path.parent.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _arguments() -> list[str]:
    """Return the command line's arguments without where the JSON goes."""
    given = sys.argv[1:]
    return [x for i, x in enumerate(given) if "--json" not in (x, *given[max(i - 1, 0) : i])]
