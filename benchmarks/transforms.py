"""What do the transforms cost beside the same thing written by hand?

Run: ``python benchmarks/transforms.py`` (about three minutes on two cores). Contestants take turns
in one process; the table shows medians and the median of the ratio within each turn. Targets:
``accumulate`` at most 1.05 times a hand-written scan where there is work in a micro-batch (met at
eight sequences of 128 tokens, 1.02 to 1.03, and about met at four, 1.04 to 1.06; at two the sums
that keep any layout's bits cost 1.07 to 1.14), ``per_example`` at most 1.1 times a hand-written
vmap. ``exact`` against ``fast`` reduction runs on eight virtual devices, with the
bytes that each device sends according to the compiled program; ``remat`` shows the temporaries
that XLA plans and the time, by policy, beside the plain function.
"""

import argparse
import re
import statistics
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from report import report
from rich.table import Table
from turns import turns

from fnml import Metrics, init, models, train, transforms

PyTree = Any
GPT = models.GPTConfig(width=128, layers=4, heads=4, context=128)


def problem(batch_size: int) -> tuple[Any, PyTree, PyTree]:
    """A small GPT's gradient function, its parameters, and a batch."""
    model = models.gpt(GPT)
    tokens = np.random.default_rng(0).integers(0, GPT.vocab, (batch_size, GPT.context + 1))
    batch = {"tokens": jnp.asarray(tokens[:, :-1]), "targets": jnp.asarray(tokens[:, 1:])}

    def loss_fn(params: PyTree, batch: PyTree, key: Any) -> Any:
        loss = train.next_token(model.apply(params, batch["tokens"]), batch["targets"])
        return loss.value, Metrics(loss.weight)

    return loss_fn, init(model.spec, jax.random.key(0)), batch


def add_rows(table: Table, what: str, times: dict[str, list[float]], extra: dict[str, str]) -> None:
    """Add one row per contestant; the first one is what the others are compared with."""
    base = next(iter(times))
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[base], strict=True)]
        table.add_row(
            what,
            name,
            f"{1e3 * statistics.median(seconds):.1f}",
            f"{statistics.median(ratios):.3f}",
            extra.get(name, ""),
        )


def accumulation(table: Table, rounds: int) -> None:
    """``accumulate`` against a scan that adds up gradients, with little and more work per shard."""
    for size in (2, 4, 8):
        accumulation_of(size, table, rounds)


def accumulation_of(size: int, table: Table, rounds: int) -> None:
    """Measure micro-batches of ``size`` sequences."""
    count = 8
    loss_fn, params, batch = problem(count * size)
    grad_fn, key = jax.value_and_grad(loss_fn, has_aux=True), jax.random.key(0)

    @jax.jit
    def by_hand(params: PyTree, batch: PyTree) -> PyTree:
        parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)

        def body(total: PyTree, part: PyTree) -> tuple[PyTree, None]:
            (loss, _), grads = grad_fn(params, part, key)
            return jax.tree.map(jnp.add, total, (loss, grads)), None

        start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        total, _ = lax.scan(body, start, parts)
        return jax.tree.map(lambda x: x / count, total)

    ours = jax.jit(lambda params, batch: transforms.accumulate(grad_fn, count)(params, batch, key))
    functions = {
        "scan by hand": lambda: by_hand(params, batch),
        "accumulate": lambda: ours(params, batch),
    }
    add_rows(table, f"{count} micro-batches of {size}", turns(functions, rounds), {})


def examples(table: Table, rounds: int) -> None:
    """``per_example`` against a vmap."""
    loss_fn, params, batch = problem(8)
    grad_fn, key = jax.value_and_grad(loss_fn, has_aux=True), jax.random.key(0)

    @jax.jit
    def by_hand(params: PyTree, batch: PyTree) -> PyTree:
        single = jax.tree.map(lambda x: x[:, None], batch)
        return jax.vmap(lambda example: grad_fn(params, example, key))(single)

    whole, chunked = (
        jax.jit(lambda p, b, chunk=chunk: transforms.per_example(grad_fn, chunk)(p, b, key))
        for chunk in (None, 2)
    )
    functions = {
        "vmap by hand": lambda: by_hand(params, batch),
        "per_example": lambda: whole(params, batch),
        "per_example, chunk=2": lambda: chunked(params, batch),
    }
    add_rows(table, "8 examples", turns(functions, rounds), {})


_COLLECTIVE = re.compile(
    r"= \(?(?P<type>\w+)\[(?P<shape>[\d,]*)\].*? (?P<name>all-reduce|all-gather|all-to-all)\("
)


def sent(compiled: Any, devices: int) -> str:
    """Add up the bytes each device sends for the collectives of a compiled program."""
    total = 0.0
    for line in compiled.as_text().splitlines():
        found = _COLLECTIVE.search(line)
        if not found:
            continue
        shapes = re.findall(r"(f32|f64|s32|u32)\[([\d,]*)\]", line.split(found["name"] + "(")[0])
        size = sum(
            (8 if kind == "f64" else 4) * int(np.prod([int(n) for n in dims.split(",") if n]))
            for kind, dims in shapes
        )
        share = (devices - 1) / devices
        # A ring all-reduce is a reduce-scatter and an all-gather: each part travels twice.
        total += size * share * (2 if found["name"] == "all-reduce" else 1)
    return f"{total / 1e6:.2f} MB sent per device"


def reductions(table: Table, rounds: int) -> None:
    """Exact, ordered reduction against psum."""
    loss_fn, params, batch = problem(8)
    grad_fn, key = jax.value_and_grad(loss_fn, has_aux=True), jax.random.key(0)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    functions, extra = {}, {}
    for reduce in ("fast", "exact"):
        laid = transforms.data_parallel(grad_fn, mesh, reduce=reduce)
        run = jax.jit(lambda p, b, laid=laid: laid(p, b, key)).lower(params, batch).compile()
        name = f"data_parallel, {reduce}"
        functions[name] = lambda run=run: run(params, batch)
        extra[name] = sent(run, 8)
    add_rows(table, "8 virtual devices", turns(functions, rounds), extra)


def recomputation(table: Table, rounds: int) -> None:
    """Memory and time of ``remat``, by policy."""
    loss_fn, params, batch = problem(8)
    policies = {"plain": None, "everything": "everything", "dots": "dots", "nothing": "nothing"}
    functions, extra = {}, {}
    for name, policy in policies.items():
        loss = loss_fn if policy is None else transforms.remat(loss_fn, policy)
        grad_fn = jax.value_and_grad(loss, has_aux=True)
        run = jax.jit(lambda p, b, g=grad_fn: g(p, b, None)).lower(params, batch).compile()
        label = name if policy is None else f"remat, {name}"
        functions[label] = lambda run=run: run(params, batch)
        extra[label] = f"{run.memory_analysis().temp_size_in_bytes / 1e6:.1f} MB temporaries"
    add_rows(table, "4 layers, batch 8", turns(functions, rounds), extra)


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    measures = [accumulation, examples, reductions, recomputation]
    parser.add_argument("--only", choices=[measure.__name__ for measure in measures])
    parser.add_argument("--json", type=Path, help="where to write the table and the machine")
    options = parser.parse_args()
    rounds = options.rounds
    table = Table("what", "contestant", "median ms", "ratio", "note")
    for measure in measures:
        if options.only in (None, measure.__name__):
            measure(table, rounds)
    report({f"What transforms cost ({rounds} rounds)": table}, options.json)


if __name__ == "__main__":
    main()
