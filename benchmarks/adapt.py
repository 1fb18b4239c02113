"""What do low-rank fine-tuning and quantisation cost in loss, and save in numbers and bytes?

Run: ``python benchmarks/adapt.py`` (about half an hour on two cores, ``--width 128 --steps 250 --tune 80``
for a short look). It pre-trains the ``lm`` recipe's GPT, twice as wide, on the Python standard library's
source and fine-tunes it to another text: NumPy's Python source, or with ``--text documentation`` the English
topics that ``pydoc`` carries (left out of the first text). Every 20th file or topic is held out.

Targets: LoRA trains less than 2% of the parameters to a loss within 3% of full fine-tuning; int8 is
within 0.5% of the float loss, int4 with groups within 2%. After 1,500 steps, and 100 on NumPy's source,
full fine-tuning went from 1.606 to 1.445 nats per byte, and rank 5 in the MLPs, 1.72% of the parameters, to
1.479 (2.4% above). Longer tuning widens that: 3.7% above after 200 steps. So does a smaller model, of whose
matrices 2% is hardly a rank: at half the width, with 3,000 and 200 steps, rank 3 in the MLPs (1.99%) ended
5.3% above, rank 8 (5.3%) 3.3% and rank 16 everywhere (19.5%) 1.3%. On the source int8 cost 0.00%, int4 in
groups of 32 0.43% (1.34% at half the width).
"""

import argparse
import inspect
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data import topics as pydoc_topics
from typing import Any

import jax
import numpy as np
import optax
from rich import print
from rich.table import Table

from fnml import Metrics, Model, State, count, init
from fnml.data import Batches, TokenSource, epoch
from fnml.models import GPTConfig, gpt
from fnml.recipes._corpus import Corpus, standard_library
from fnml.train import OptimizerConfig, evaluator, fit, next_token, optimizer, train_step
from fnml.transforms import (
    adapt,
    lora,
    merge,
    quantize,
    train_only,
    trainable,
    trainable_value_and_grad,
)

PyTree = Any
CONTEXT = 128
BATCH = 16
# The best of 5e-4, 1e-3 and 2e-3, and the better of 1e-2 and 2e-2.
FULL_RATE, LORA_RATE = 1e-3, 1e-2


def corpora(second: str) -> tuple[Corpus, Corpus]:
    """Return the source to learn from, and the text to go on with."""
    documentation = inspect.getsource(pydoc_topics).encode()
    code = Corpus(*(part.replace(documentation, b"") for part in standard_library()))
    if second == "numpy":
        package = Path(np.__file__).parent
        files = [path for path in sorted(package.rglob("*.py")) if "test" not in path.name]
        texts = [path.read_bytes() for path in files]
    else:
        texts = [text.encode() for _, text in sorted(pydoc_topics.topics.items())]
    return code, Corpus(
        b"\n".join(text for i, text in enumerate(texts) if i % 20 != 19),
        b"\n".join(text for i, text in enumerate(texts) if i % 20 == 19),
    )


def loss_of(model: Model) -> Callable[..., Any]:
    def loss_fn(params: PyTree, batch: PyTree, key: Any) -> Any:
        loss = next_token(model.apply(params, batch["tokens"], key=key), batch["targets"])
        return loss.value, Metrics(loss.weight)

    return loss_fn


def source(text: bytes, stride: int) -> TokenSource:
    return TokenSource(np.frombuffer(text, np.uint8), CONTEXT, stride)


def held_out_loss(model: Model, params: PyTree, text: bytes) -> float:
    held_out = source(text, CONTEXT)

    def batches() -> Iterator[PyTree]:
        return (
            {"tokens": batch["tokens"], "targets": batch["targets"]}
            for batch in epoch(held_out, 64)
            if len(batch["tokens"]) == 64
        )

    evaluate = evaluator(loss_of(model), batches)
    state = State.create(params, optax.identity(), jax.random.key(0))
    return float(evaluate(state)["loss"].value)


def train(
    model: Model, params: PyTree, text: bytes, steps: int, rate: float
) -> tuple[PyTree, int, float]:
    """Train what trains; return the parameters, the optimizer's bytes, and the seconds."""
    rule = OptimizerConfig(
        learning_rate=rate, warmup=min(100, steps // 5), b2=0.99, clip=1.0, final_fraction=0.02
    )
    tx = train_only(optimizer(rule, steps), model)
    state = State.create(params, tx, jax.random.key(1))
    memory = sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
    step = train_step(trainable_value_and_grad(loss_of(model), model), tx)
    batches = Batches(source(text, CONTEXT // 2), BATCH, seed=0)
    began = time.perf_counter()
    done = fit(step, state, batches, steps=steps, log_every=steps, fuse=10)
    return done.state.params, memory, time.perf_counter() - began


def nbytes(tree: PyTree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def tuned(
    table: Table,
    name: str,
    model: Model,
    params: PyTree,
    text: Corpus,
    steps: int,
    rate: float,
    whole: int,
) -> tuple[float, PyTree]:
    """Fine-tune and add a row; return the loss and the parameters."""
    trains = sum(
        p.size
        for p, hit in zip(
            jax.tree.leaves(model.spec), jax.tree.leaves(trainable(model)), strict=True
        )
        if hit
    )
    after, memory, seconds = train(model, params, text.train, steps, rate)
    loss = held_out_loss(model, after, text.held_out)
    table.add_row(
        name,
        f"{loss:.4f}",
        f"{trains:,} ({trains / whole:.2%})",
        f"{memory:,}",
        f"{nbytes(after):,}",
        f"{seconds:.0f}",
    )
    return loss, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256, help="width of the GPT")
    parser.add_argument("--steps", type=int, default=1500, help="steps of pre-training")
    parser.add_argument("--tune", type=int, default=100, help="steps of fine-tuning")
    parser.add_argument("--text", choices=("numpy", "documentation"), default="numpy")
    given = parser.parse_args()
    code, text = corpora(given.text)
    base = gpt(GPTConfig(vocab=256, width=given.width, layers=4, heads=4, context=CONTEXT))
    params, _, seconds = train(
        base, init(base.spec, jax.random.key(0)), code.train, given.steps, 3e-3
    )
    print(f"pre-trained: {given.steps} steps, {count(base.spec):,} parameters, {seconds:.0f} s")

    table = Table(title=f"Fine-tuning to another text ({given.text}), {given.tune} steps")
    for column in ("", "loss", "trained", "optimizer bytes", "parameter bytes", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("not tuned", f"{held_out_loss(base, params, text.held_out):.4f}", "0", "", "", "")
    whole = count(base.spec)
    full, _ = tuned(table, "full", base, params, text, given.tune, FULL_RATE, whole)
    # The rank whose factors are just below 2% of the parameters.
    few = max(1, 5 * given.width // 256)
    losses = {}
    for name, under, rank, targets in (
        (f"LoRA, rank {few} in the MLPs", base, few, "layers/mlp/*"),
        ("LoRA, the same over int8", quantize(base), few, "layers/mlp/*"),
        ("LoRA, rank 16 everywhere", base, 16, None),
    ):
        model = lora(under, rank, alpha=8.0, targets=targets)
        start = adapt(model, params, jax.random.key(2))
        losses[name], after = tuned(table, name, model, start, text, given.tune, LORA_RATE, whole)
        if rank == few and under is base:
            merged = held_out_loss(base, merge(model, after), text.held_out)
            table.add_row("  merged into the base", f"{merged:.4f}", "", "", "", "")
    print(table)
    for name, loss in losses.items():
        print(f"{name}: {loss / full - 1:+.2%} of the loss of full fine-tuning (target: 3%)")

    table = Table(title="Weight-only quantisation, held-out source")
    for column in ("", "loss", "against float", "parameter bytes"):
        table.add_column(column, justify="left" if not column else "right")
    reference = held_out_loss(base, params, code.held_out)
    for name, options in (
        ("float32", None),
        ("int8", {"bits": 8}),
        ("int8, zero point", {"bits": 8, "zero_point": True}),
        ("int4", {"bits": 4}),
        ("int4, groups of 32", {"bits": 4, "group": 32}),
        ("int4, groups of 32, zero point", {"bits": 4, "group": 32, "zero_point": True}),
        ("int4, groups of 16, zero point", {"bits": 4, "group": 16, "zero_point": True}),
    ):
        model = base if options is None else quantize(base, **options)
        stored = adapt(model, params)
        loss = held_out_loss(model, stored, code.held_out)
        table.add_row(name, f"{loss:.4f}", f"{loss / reference - 1:+.2%}", f"{nbytes(stored):,}")
    print(table)


if __name__ == "__main__":
    main()
