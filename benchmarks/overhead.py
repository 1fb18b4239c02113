"""What does ``fit`` cost, and what does ``fuse`` gain, against a hand-written jitted loop?

Run: ``python benchmarks/overhead.py`` (about five minutes on two cores). The hand-written loop
gathers its batches inline, donates, and reads the loss every 50 steps, as ``fit`` does. The
contestants take turns in one process; what is timed lies between the first reading of the loss and
the last, so compilation is not. The table shows the medians of their steps per second and of the
ratio within each turn. Targets: unfused at least 0.97, fused at least 1.3 on the MLP.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from report import report
from rich.table import Table

from fnml import Metrics, State, data, init, models, recipes, train
from fnml.core import Row

LOG_EVERY = 50


def digits_mlp() -> tuple[Any, data.Source, int, Callable[..., Any]]:
    """The digits perceptron: steps of a fraction of a millisecond."""
    model = models.mlp(recipes.find_recipe("digits").config().mlp)
    rng = np.random.default_rng(0)
    source = data.ArraySource(
        {
            "x": rng.normal(size=(1437, 64)).astype(np.float32),
            "y": rng.integers(0, 10, 1437).astype(np.int32),
        }
    )

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        loss = train.cross_entropy(model.apply(params, batch["x"]), batch["y"])
        return loss.value, Metrics(loss.weight)

    return model, source, 128, loss_fn


def small_gpt() -> tuple[Any, data.Source, int, Callable[..., Any]]:
    """The language-model recipe's GPT: steps of tens of milliseconds."""
    config = recipes.find_recipe("lm").config()
    model = models.gpt(config.model)
    tokens = np.random.default_rng(0).integers(0, 256, 1 << 20).astype(np.uint8)
    source = data.TokenSource(tokens, config.model.context)

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        loss = train.next_token(model.apply(params, batch["tokens"]), batch["targets"])
        return loss.value, Metrics(loss.weight)

    return model, source, 16, loss_fn


def by_hand(
    model: Any, source: Any, size: int, loss_fn: Any, optimizer: Any
) -> Callable[[int], list[tuple[int, float]]]:
    """Write the loop that one writes without fnml."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, None)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    def loop(steps: int) -> list[tuple[int, float]]:
        params = init(model.spec, jax.random.key(0))
        opt_state = optimizer.init(params)
        rng = np.random.default_rng(0)
        order, at, marks = rng.permutation(len(source)), 0, []
        for i in range(steps):
            if at + size > len(order):
                order, at = rng.permutation(len(source)), 0
            batch = source.gather(order[at : at + size])
            at += size
            params, opt_state, loss = step(params, opt_state, batch)
            if (i + 1) % LOG_EVERY == 0:
                float(loss)
                marks.append((i + 1, time.perf_counter()))
        return marks

    return loop


class Marks:
    """A sink that keeps when each row came."""

    def __init__(self) -> None:
        self.marks: list[tuple[int, float]] = []

    def write(self, row: Row) -> None:
        """Note the time."""
        self.marks.append((row.step, time.perf_counter()))

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self) -> None:
        """Nothing is open."""


def with_fit(
    model: Any, source: Any, size: int, loss_fn: Any, optimizer: Any, fuse: int
) -> Callable[[int], list[tuple[int, float]]]:
    """Call ``fit`` on the same loss, optimizer and data."""
    step = train.train_step(jax.value_and_grad(loss_fn, has_aux=True), optimizer)

    def loop(steps: int) -> list[tuple[int, float]]:
        state = State.create(init(model.spec, jax.random.key(0)), optimizer, jax.random.key(0))
        marks = Marks()
        batches = data.Batches(source, size)
        train.fit(step, state, batches, steps=steps, fuse=fuse, log_every=LOG_EVERY, sinks=[marks])
        return marks.marks

    return loop


def rate(marks: list[tuple[int, float]]) -> float:
    """Steps per second between the first mark and the last."""
    (first, began), (last, ended) = marks[0], marks[-1]
    return (last - first) / (ended - began)


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["mlp", "gpt"])
    parser.add_argument("--json", type=Path, help="where to write the table and the machine")
    options = parser.parse_args()
    rounds = options.rounds
    tasks = {"mlp": ("digits MLP", digits_mlp, 1050), "gpt": ("small GPT", small_gpt, 150)}
    table = Table("model", "loop", "steps/s", "ratio to by hand", "lowest", "highest")
    for key, (name, make, steps) in tasks.items():
        if options.only not in (None, key):
            continue
        model, source, size, loss_fn = make()
        optimizer = optax.adamw(1e-3)
        loops = {
            "by hand": by_hand(model, source, size, loss_fn, optimizer),
            "fit": with_fit(model, source, size, loss_fn, optimizer, 1),
            "fit, fuse=32": with_fit(model, source, size, loss_fn, optimizer, 32),
        }
        turns = []
        for turn in range(rounds):
            names = list(loops) if turn % 2 else list(loops)[::-1]
            turns.append({each: rate(loops[each](steps)) for each in names})
        for loop_name in loops:
            speeds = [turn[loop_name] for turn in turns]
            ratios = [turn[loop_name] / turn["by hand"] for turn in turns]
            table.add_row(
                name,
                loop_name,
                f"{statistics.median(speeds):.1f}",
                f"{statistics.median(ratios):.3f}",
                f"{min(ratios):.3f}",
                f"{max(ratios):.3f}",
            )
    report({f"What the loop costs ({rounds} rounds)": table}, options.json)


if __name__ == "__main__":
    main()
