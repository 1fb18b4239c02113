"""Is AdamW faster over one flat buffer than over the tree of parameters, inside a jitted step?

Run: ``python benchmarks/flat_optimizer.py`` (about two minutes on two cores). The contestants take
turns in one process: the tree as it is; moments kept flat, with gradients and parameters laid out
flat in each step; and moments as a tree too, which checkpoints by path need. Beside whole training
steps there is one of 130 leaves that does nothing but the update.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from report import report
from rich.table import Table
from turns import turns

import fnml
from fnml import init, models, train

PyTree = Any


def mlp(hidden: tuple[int, ...]) -> tuple[PyTree, Callable[[PyTree], jax.Array]]:
    """A perceptron on 128 examples: its parameters and its loss."""
    model = models.mlp(models.MLPConfig(inputs=64, hidden=hidden, outputs=10))
    x = np.random.default_rng(0).normal(size=(128, 64)).astype(np.float32)
    y = np.arange(128, dtype=np.int32) % 10
    return init(
        model.spec, jax.random.key(0)
    ), lambda params: train.cross_entropy(model.apply(params, x), y).value


def update_only() -> tuple[PyTree, Callable[[PyTree], jax.Array]]:
    """The 130 leaves of a deep perceptron, under a loss that costs nothing."""
    params, _ = mlp((64,) * 64)
    return params, lambda params: sum((x * x).sum() for x in jax.tree.leaves(params))


def gpt() -> tuple[PyTree, Callable[[PyTree], jax.Array]]:
    """The language-model recipe's GPT, whose layers are stacked: 12 leaves."""
    model = models.gpt(models.GPTConfig(vocab=256, width=128, layers=4, heads=4, context=128))
    tokens = np.random.default_rng(0).integers(0, 256, (16, 129)).astype(np.int32)
    return init(
        model.spec, jax.random.key(0)
    ), lambda params: train.next_token(model.apply(params, tokens[:, :-1]), tokens[:, 1:]).value


def steps(
    params: PyTree, loss: Callable[[PyTree], jax.Array], count: int
) -> dict[str, Callable[[], Any]]:
    """Make each contestant's function that takes ``count`` steps."""
    optimizer = optax.adamw(1e-3)
    unravel = ravel_pytree(params)[1]

    def ravel(tree: PyTree) -> jax.Array:
        return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)])

    def whole_tree(params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    def flat(params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        line = ravel(params)
        updates, state = optimizer.update(ravel(jax.grad(loss)(params)), state, line)
        return unravel(line + updates), state

    def flat_inside(params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        moments = state[0]
        laid = (moments._replace(mu=ravel(moments.mu), nu=ravel(moments.nu)), *state[1:])
        params, (moments, *rest) = flat(params, laid)
        moments = moments._replace(mu=unravel(moments.mu), nu=unravel(moments.nu))
        return params, (moments, *rest)

    def repeat(step: Callable[..., Any], state: PyTree) -> Callable[[], Any]:
        run = jax.jit(step, donate_argnums=(0, 1))
        held = [jax.tree.map(jnp.copy, (params, state))]

        def times() -> Any:
            for _ in range(count):
                held[0] = run(*held[0])
            return held[0]

        return times

    tree = optimizer.init(params)
    return {
        "tree": repeat(whole_tree, tree),
        "flat moments": repeat(flat, optimizer.init(ravel(params))),
        "flat inside the step": repeat(flat_inside, tree),
    }


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="where to write the table and the machine")
    options = parser.parse_args()
    fnml.keep_memory()
    problems = {
        "digits MLP, 6 leaves": (mlp((128, 128)), 200),
        "MLP of 64 layers, 130 leaves": (mlp((64,) * 64), 50),
        "130 leaves, the update alone": (update_only(), 100),
        "GPT d=128, 12 leaves": (gpt(), 2),
    }
    table = Table("step", "contestant", "ms", "lowest", "highest", "speed, times tree")
    for name, ((params, loss), count) in problems.items():
        times = turns(steps(params, loss, count), options.rounds)
        for contestant, seconds in times.items():
            ratios = [a / b for a, b in zip(times["tree"], seconds, strict=True)]
            cells = [statistics.median(seconds), min(seconds), max(seconds)]
            cells = [f"{1e3 * x / count:.3f}" for x in cells]
            table.add_row(name, contestant, *cells, f"{statistics.median(ratios):.2f}")
        table.add_section()
    report(
        {f"AdamW over a tree and over flat buffers ({options.rounds} rounds)": table}, options.json
    )


if __name__ == "__main__":
    main()
