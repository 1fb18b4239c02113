"""How fast is an imported ONNX model under jit, beside onnxruntime?

Run: ``python benchmarks/onnx_import.py MODEL.onnx ...`` (each model some seconds on two cores). Without
models, those that ship with the onnx package are taken. Both sides have two threads, get the same inputs,
and take turns in one process; the table shows medians, and the largest difference of the outputs relative
to the largest number in them. Sizes that a file leaves open are set with ``--size name=64``, or are 1; integer
inputs are ones, and given as ``static_inputs`` where they decide a shape.
"""

import os

# Before JAX starts: what the process may use is what both sides are given.
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnx
import onnxruntime
from report import report
from rich.table import Table

from fnml.core import FnmlError
from fnml.interop.onnx import from_onnx

_DTYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64,
    "tensor(int32)": np.int32, "tensor(uint8)": np.uint8, "tensor(bool)": np.bool_,
}  # fmt: skip


def draw(session: Any, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Make an input of each kind that a session takes."""
    rng = np.random.default_rng(0)
    found = {}
    for port in session.get_inputs():
        shape = [s if isinstance(s, int) and s > 0 else sizes.get(s, 1) for s in port.shape]
        dtype = _DTYPES[port.type]
        floats = np.issubdtype(dtype, np.floating)
        found[port.name] = (rng.standard_normal(shape) if floats else np.ones(shape)).astype(dtype)
    return found


def seconds(run: Any) -> float:
    """Time one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(path: Path, sizes: dict[str, int], rounds: int) -> list[str]:
    """Return one row of the table."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = draw(session, sizes)
    expected = session.run(None, given)
    start = time.perf_counter()
    # Integers that decide shapes cannot be traced; that they decide some shows when they are.
    static: dict[str, np.ndarray] = {}
    try:
        model, params = from_onnx(path)
        apply = jax.jit(model.apply)
        got = apply(params, *given.values())
    except FnmlError:
        static = {n: v for n, v in given.items() if not np.issubdtype(v.dtype, np.floating)}
        model, params = from_onnx(path, static)
        apply = jax.jit(model.apply)
        got = apply(params, *[given[p.name] for p in model.apply.inputs])
    jax.block_until_ready(got)
    first = time.perf_counter() - start
    inputs = [given[port.name] for port in model.apply.inputs]
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(seconds(lambda: jax.block_until_ready(apply(params, *inputs))))
        theirs.append(seconds(lambda: session.run(None, given)))
    several = got if isinstance(got, tuple) else (got,)
    error = max(
        float(np.abs(np.asarray(a, np.float64) - b).max(initial=0) / max(np.abs(b).max(), 1e-30))
        for a, b in zip(several, expected, strict=True)
    )
    a, b = statistics.median(ours) * 1e3, statistics.median(theirs) * 1e3
    size = f"{sum(x.size for x in jax.tree.leaves(params)):,}"
    return [
        path.stem,
        size,
        f"{first:.1f} s",
        f"{a:.2f}",
        f"{b:.2f}",
        f"{a / b:.1f}",
        f"{error:.0e}",
    ]


def main() -> int:
    """Measure every model and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--size", nargs="*", default=[], help="name=number of an open dimension")
    parser.add_argument("--json", type=Path, help="where to write the table and the machine")
    options = parser.parse_args()
    light = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    sizes = {name: int(value) for name, value in (text.split("=") for text in options.size)}
    table = Table(
        "model", "parameters", "import, compile", "fnml ms", "onnxruntime ms", "ratio", "error"
    )
    for path in options.models or sorted(light.glob("*.onnx")):
        table.add_row(*measure(path, sizes, options.rounds))
    report({"Imported ONNX models beside onnxruntime": table}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
