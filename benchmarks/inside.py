"""What does it cost to look inside a function?

Run: ``python benchmarks/inside.py`` (about a minute on two cores; ``--small`` for a few seconds).
Contestants take turns in one process; the table shows medians and the median of the ratio within
each turn. Targets: ``autocast`` as fast as casts written by hand, and tracing a function with a
walk over it at most 1.5 times tracing it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from rich import print
from rich.table import Table
from turns import turns

from fnml import Metrics, init, models, train
from fnml.transforms import autocast, capture, checked
from fnml.transforms._walk import Rules, trace, walk

PyTree = Any


def add_rows(table: Table, what: str, times: dict[str, list[float]]) -> None:
    """Add one row per contestant; the first one is what the others are compared with."""
    base = next(iter(times))
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[base], strict=True)]
        cells = (f"{1e3 * statistics.median(seconds):.2f}", f"{statistics.median(ratios):.3f}")
        table.add_row(what, name, *cells)


def products(table: Table, rounds: int, width: int) -> None:
    """``autocast`` against casts by hand, in the gradient of a perceptron."""
    rng = np.random.default_rng(0)
    ws = jnp.asarray(rng.normal(size=(4, width, width)) / width**0.5, jnp.float32)
    x = jnp.asarray(rng.normal(size=(256, width)), jnp.float32)

    def loss(dot: Callable[..., Any]) -> Callable[..., Any]:
        def call(ws: Any, x: Any) -> Any:
            for w in ws:
                x = jnp.tanh(dot(x, w))
            return jnp.mean(x**2)

        return call

    def by_hand(x: Any, w: Any) -> Any:
        return (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)

    hand = jax.jit(jax.value_and_grad(loss(by_hand)))
    cast = jax.jit(jax.value_and_grad(autocast(loss(jnp.matmul))))
    wide = jax.jit(jax.value_and_grad(loss(jnp.matmul)))
    contestants = {"by hand": hand, "autocast": cast, "float32": wide}
    times = turns({name: lambda f=f: f(ws, x) for name, f in contestants.items()}, rounds)
    add_rows(table, "bfloat16 products", times)


def problem(small: bool) -> tuple[Any, PyTree, PyTree]:
    """A small GPT's loss with three named values, its parameters, and a batch."""
    size = {"width": 32, "layers": 2, "context": 32} if small else {"width": 128, "context": 128}
    config = models.GPTConfig(heads=4, **size)
    model = models.gpt(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab, (8, config.context + 1))
    batch = {"tokens": jnp.asarray(tokens[:, :-1]), "targets": jnp.asarray(tokens[:, 1:])}

    def loss_fn(params: PyTree, batch: PyTree, key: Any) -> Any:
        logits = checkpoint_name(model.apply(params, batch["tokens"]), "logits")
        loss = train.next_token(logits, batch["targets"])
        return loss.value, Metrics(loss.weight)

    return loss_fn, init(model.spec, jax.random.key(0)), batch


def step(table: Table, rounds: int, small: bool) -> None:
    """A gradient that is captured from, or checked, against the plain one."""
    loss_fn, params, batch = problem(small)
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    names = ("attention_out", "mlp_out", "logits")
    contestants = {
        "plain": jax.jit(grad_fn),
        "capture of three": jax.jit(capture(grad_fn, names)),
        "capture, statistics": jax.jit(capture(grad_fn, names, stats=True)),
        "capture, exact": jax.jit(capture(grad_fn, names, exact=True)),
        "checked inside jit": jax.jit(checked(grad_fn)),
        "checked outside": checked(jax.jit(grad_fn)),
    }
    calls = {name: lambda f=f: f(params, batch, None) for name, f in contestants.items()}
    add_rows(table, "GPT gradient", turns(calls, rounds))


def tracing(table: Table, rounds: int, small: bool) -> None:
    """Tracing, against tracing with a walk over every body, and with autocast's."""
    loss_fn, params, batch = problem(small)
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def walked(*args: Any) -> Any:
        traced = trace(grad_fn, args, {})
        rules = Rules(rewrite=lambda eqn, values: None)
        return walk(traced.closed, traced.flat, rules)[0]

    def fresh(function: Callable[..., Any]) -> Callable[[], Any]:
        # What was traced once is remembered: each turn starts from nothing.
        def call() -> Any:
            jax.clear_caches()
            began = time.perf_counter()
            jax.make_jaxpr(lambda *args: function(*args))(params, batch, None)
            seconds.append(time.perf_counter() - began)

        return call

    seconds: list[float] = []
    contestants = {
        "plain": fresh(grad_fn),
        "walk over all": fresh(walked),
        "autocast": fresh(autocast(grad_fn)),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for name in list(contestants) if turn % 2 else list(contestants)[::-1]:
            contestants[name]()
            times[name].append(seconds.pop())
    add_rows(table, "tracing", times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="sizes for a few seconds")
    small = parser.parse_args().small
    table = Table("what", "contestant", "median ms", "ratio")
    products(table, 5 if small else 25, 64 if small else 1024)
    step(table, 5 if small else 15, small)
    tracing(table, 3 if small else 7, small)
    print(table)


if __name__ == "__main__":
    main()
