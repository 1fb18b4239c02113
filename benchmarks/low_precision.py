"""What do bfloat16 and int8 gain on a CPU, here and in PyTorch?

Run: ``python benchmarks/low_precision.py`` (about a minute). Square matrix products in float32,
bfloat16 and int8 (summed in int32), and the training step of a small GPT with the policy of
``mixed_precision``. With ``FNML_TORCH_PYTHON`` (or ``--torch``) naming an interpreter that has
PyTorch, its products take turns with ours, in a process of its own, two threads each.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from report import report
from rich.table import Table
from turns import turns

import fnml
from fnml import Metrics, State, init, models, train, transforms

SIDE, REPEATS = 1024, 20
TORCH = """
import sys, torch
torch.set_num_threads(2)
side, repeats = int(sys.argv[1]), int(sys.argv[2])
a, b = torch.randn(side, side), torch.randn(side, side)
products = {
    "float32": lambda: a @ b,
    "bfloat16": lambda a=a.bfloat16(), b=b.bfloat16(): a @ b,
    "int8": lambda a=a.mul(30).char(), b=b.mul(30).char(): torch._int_mm(a, b),
}
for line in sys.stdin:
    with torch.no_grad():
        for _ in range(repeats):
            products[line.strip()]()
    print("done", flush=True)
"""


def product(dtype: Any, total: Any) -> Callable[[], jax.Array]:
    """Multiply two matrices, ``REPEATS`` times, each time waiting for the result."""
    rng = np.random.default_rng(0)
    a, b = (
        jnp.asarray((30 * rng.normal(size=(SIDE, SIDE))).clip(-127, 127), dtype) for _ in range(2)
    )
    run = jax.jit(lambda a, b: lax.dot(a, b, preferred_element_type=total))

    def repeat() -> jax.Array:
        for _ in range(REPEATS):
            out = jax.block_until_ready(run(a, b))
        return out

    return repeat


def gpt_step(dtype: Any) -> Callable[[], Any]:
    """Take a training step of the language-model recipe's GPT."""
    config = models.GPTConfig(vocab=256, width=128, layers=4, heads=4, context=128)
    model = models.gpt(config)

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        loss = train.next_token(model.apply(params, batch[:, :-1]), batch[:, 1:])
        return loss.value, Metrics(loss.weight)

    if dtype != jnp.float32:
        loss_fn = transforms.mixed_precision(loss_fn, transforms.Policy(compute=dtype))
    optimizer = optax.adamw(1e-3)
    step = jax.jit(
        train.train_step(jax.value_and_grad(loss_fn, has_aux=True), optimizer), donate_argnums=0
    )
    held = [State.create(init(model.spec, jax.random.key(0)), optimizer, jax.random.key(1))]
    batch = np.random.default_rng(0).integers(0, 256, (16, 129)).astype(np.int32)

    def run() -> Any:
        held[0], metrics = step(held[0], batch)
        return metrics

    return run


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--torch", default=os.environ.get("FNML_TORCH_PYTHON"))
    parser.add_argument("--json", type=Path, help="where to write the table and the machine")
    options = parser.parse_args()
    fnml.keep_memory()
    functions: dict[str, Callable[[], Any]] = {
        "float32": product(jnp.float32, jnp.float32),
        "bfloat16": product(jnp.bfloat16, jnp.bfloat16),
        "int8": product(jnp.int8, jnp.int32),
    }
    process = None
    if options.torch:
        command = [options.torch, "-c", TORCH, str(SIDE), str(REPEATS)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # A waiting thread must not spin: the next contestant needs its core.
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        process = subprocess.Popen(command, **pipes, text=True, env=environment)

        def ask(name: str) -> None:
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            if process.stdout.readline() != "done\n":
                raise RuntimeError("PyTorch's process failed: its error is above")

        for name in list(functions):
            functions[f"PyTorch, {name}"] = lambda name=name: ask(name)
    else:
        print("PyTorch is left out: FNML_TORCH_PYTHON names no Python with it", file=sys.stderr)
    times = turns(functions, options.rounds)
    products = Table("product", "GFLOP/s", "lowest", "highest", "ratio to float32 in jax")
    work = 2 * SIDE**3 * REPEATS / 1e9
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(times["float32"], seconds, strict=True)]
        cells = [
            statistics.median(work / s for s in seconds),
            work / max(seconds),
            work / min(seconds),
        ]
        products.add_row(name, *[f"{x:.0f}" for x in cells], f"{statistics.median(ratios):.2f}")
    if process is not None:
        process.stdin.close()
        process.wait()
    steps = Table("GPT step", "ms", "lowest", "highest", "speed, times float32")
    times = turns(
        {"float32": gpt_step(jnp.float32), "bfloat16": gpt_step(jnp.bfloat16)}, options.rounds
    )
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(times["float32"], seconds, strict=True)]
        cells = [statistics.median(seconds), min(seconds), max(seconds)]
        steps.add_row(name, *[f"{1e3 * x:.1f}" for x in cells], f"{statistics.median(ratios):.2f}")
    tables = {
        f"Products of {SIDE} x {SIDE} matrices ({options.rounds} rounds)": products,
        "A GPT's step, width 128, 4 layers, 16 x 128 tokens": steps,
    }
    report(tables, options.json)


if __name__ == "__main__":
    main()
