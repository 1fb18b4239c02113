"""What do the kernels cost on a CPU, beside naive jnp, JAX's own and PyTorch?

Run: ``python benchmarks/kernels_cpu.py [attention] [loss]``. Value and gradient in float32, by
length: the median of the times, the median of the ratios within each turn to ours, and the
temporaries that XLA plans. JAX's contestants take turns in one process; PyTorch answers from a process of its own
(``--torch``, or ``FNML_TORCH_PYTHON``), between JAX's turns, with as many threads as there are
CPUs. "fnml" is the lax body, "fnml, native" the one in C++. Targets for the latter: attention at most 0.4 of the naive time from 2,048 on and below PyTorch's, memory
linear in T; the loss at most an eighth of the naive memory at no loss of time.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from report import report
from rich.table import Table
from turns import turns

from fnml.pallas_kernels import attention, linear_cross_entropy, native_faults

TORCH = r"""
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
F = torch.nn.functional
problems = {}
def attention(T):
    q, k, v, g = (torch.randn(1, 4, T, 64) for _ in range(4))
    for x in (q, k, v): x.requires_grad_()
    def run():
        for x in (q, k, v): x.grad = None
        F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(g)
    return run
def loss(T):
    x, w = torch.randn(T, 256, requires_grad=True), (torch.randn(256, 32768) / 16).requires_grad_()
    labels = torch.randint(0, 32768, (T,))
    def run():
        x.grad = w.grad = None
        F.cross_entropy(x @ w, labels).backward()
    return run
for line in sys.stdin:
    name, size = line.split()
    if (name, size) not in problems:
        problems.clear()
        problems[name, size] = globals()[name](int(size))
    problems[name, size]()
    print("done", flush=True)
"""


class Row(NamedTuple):
    """One length: contestants by name, ours first, and their temporaries in bytes."""

    name: str
    functions: dict[str, Callable[[], Any]]
    temporaries: dict[str, int]


def compiled(function: Callable[..., Any], *arrays: jax.Array) -> tuple[Callable[[], Any], int]:
    """Return a call of the compiled function, and the bytes of its temporaries."""
    program = jax.jit(function).lower(*arrays).compile()
    return lambda: program(*arrays), program.memory_analysis().temp_size_in_bytes


def row(name: str, candidates: dict[str, Callable[..., Any]], *arrays: jax.Array) -> Row:
    """Compile all candidates on the same arrays."""
    both = {key: compiled(function, *arrays) for key, function in candidates.items()}
    functions = {key: call for key, (call, _) in both.items()}
    return Row(name, functions, {key: size for key, (_, size) in both.items()})


def attention_rows(lengths: list[int]) -> Iterator[Row]:
    """Causal attention: one batch row, four heads of 64."""

    def naive(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        seen = jnp.tril(jnp.ones(scores.shape[2:], bool))
        weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf), -1)
        return jnp.einsum("bhts,bshd->bthd", weights, v)

    def with_grads(function: Callable[..., jax.Array]) -> Callable[..., Any]:
        def run(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> Any:
            out, back = jax.vjp(function, q, k, v)
            return out, back(g)

        return run

    candidates = {
        "fnml": lambda q, k, v: attention(q, k, v, causal=True),
        "fnml, native": lambda q, k, v: attention(q, k, v, causal=True, implementation="native"),
        "naive jnp": naive,
        "jax.nn": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
    }
    if native_faults():
        print(f"left out: fnml, native: {'; '.join(native_faults())}", file=sys.stderr)
        del candidates["fnml, native"]
    functions = {name: with_grads(function) for name, function in candidates.items()}
    rng = np.random.default_rng(0)
    for T in lengths:
        arrays = [jnp.asarray(rng.normal(size=(1, T, 4, 64)), jnp.float32) for _ in range(4)]
        yield row(f"attention {T}", functions, *arrays)


def loss_rows(lengths: list[int]) -> Iterator[Row]:
    """A linear layer from 256 to 32,768 classes, and the mean cross entropy."""

    def naive(x: jax.Array, w: jax.Array, labels: jax.Array) -> jax.Array:
        logits = x @ w
        chosen = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
        return (jax.nn.logsumexp(logits, -1) - chosen).mean()

    def fused(x: jax.Array, w: jax.Array, labels: jax.Array) -> jax.Array:
        total, weight = linear_cross_entropy(x, w, labels)
        return total / weight

    functions = {
        "fnml": jax.value_and_grad(fused, (0, 1)),
        "naive jnp": jax.value_and_grad(naive, (0, 1)),
    }
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(256, 32768)) / 16, jnp.float32)
    for T in lengths:
        x = jnp.asarray(rng.normal(size=(T, 256)), jnp.float32)
        labels = jnp.asarray(rng.integers(0, 32768, T), jnp.int32)
        yield row(f"loss {T}", functions, x, w, labels)


TABLES = {"attention": attention_rows, "loss": loss_rows}


def torch_process(python: str) -> subprocess.Popen:
    """Start a process that runs PyTorch's side of a row whenever it is asked."""
    threads = str(len(os.sched_getaffinity(0)))
    return subprocess.Popen(
        [python, "-c", TORCH, threads],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def asking(process: subprocess.Popen, name: str) -> Callable[[], None]:
    """Return a call that has PyTorch compute a row once; the pipe costs about 0.1 ms."""

    def run() -> None:
        process.stdin.write(f"{name}\n")
        process.stdin.flush()
        if process.stdout.readline() != "done\n":
            raise RuntimeError(f"PyTorch's process failed at {name!r}: its error is above")

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="default: all of them")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--torch", default=os.environ.get("FNML_TORCH_PYTHON"))
    parser.add_argument("--json", type=Path, help="where to write the table and the machine")
    options = parser.parse_args()
    tables = {}
    process = torch_process(options.torch) if options.torch else None
    for name in options.tables or TABLES:
        table = Table("problem", "contestant", "ms", "times ours", "temporaries, MiB")
        for found in TABLES[name](options.lengths):
            functions = dict(found.functions)
            if process is not None:
                functions["PyTorch"] = asking(process, found.name)
            times = turns(functions, options.rounds)
            for key, seconds in times.items():
                ratios = [a / b for a, b in zip(seconds, times["fnml"], strict=True)]
                size = found.temporaries.get(key)
                cells = (
                    f"{1e3 * statistics.median(seconds):.1f}",
                    f"{statistics.median(ratios):.2f}",
                    "" if size is None else f"{size / 2**20:.1f}",
                )
                print(found.name, key, *cells, file=sys.stderr)
                table.add_row(found.name, key, *cells)
            table.add_section()
        tables[name] = table
    report(tables, options.json)
    if process is not None:
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    main()
