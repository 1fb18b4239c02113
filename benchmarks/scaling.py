"""What does it cost to divide a fixed amount of work over more devices, and what do they send?

Run: ``python benchmarks/scaling.py`` (about three minutes on two cores, most of it compiling). The gradient of one batch of
a small GPT, in all forms, on 1, 2, 4 and 8 virtual devices of one CPU; contestants take turns in one
process, the table shows medians. Virtual devices share the cores there are: on two cores, more than
two devices can show overhead only. (A pipeline's idle ticks compute too, which on devices of their own
costs no time that they would not have waited anyway.)

The bytes are those that each device sends in one call according to the compiled program, with
collectives counted as rings; beside them the least that the form has to send:

- P: bytes of the parameters; A: of the activations [B, T, D] of the whole batch; L: layers;
  C: of one device's keys and values in one layer.
- data: ``2 (N - 1) / N P``, an all-reduce of the gradients. fsdp: ``3 (N - 1) / N P``, parameters
  gathered forwards and backwards, gradients scattered.
- tensor: ``8 L (N - 1) / N A``, two all-reduces of activations per layer in each direction.
- pipeline: ``2 A``, each micro-batch to the next stage, and its gradient back.
- ring: ``3 (N - 1) L C + 2 (N - 1) / N P``, keys and values around forwards and backwards, their
  gradients around backwards, and the gradients of the parameters, which all devices share.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from report import report
from rich.table import Table
from turns import turns

from fnml import Metrics, count, init, models, train
from fnml.core import make_mesh, shardings
from fnml.parallel import FSDP, TENSOR, ring_attention
from fnml.plan import collectives, wire_bytes
from fnml.transforms import data_parallel, pipeline

PyTree = Any
GPT = models.GPTConfig(width=128, layers=8, heads=8, context=128, mlp_width=512, unroll=1)
B, T, D, L, MICROBATCHES = 16, GPT.context, GPT.width, GPT.layers, 8
PARAMS = 4 * count(models.gpt(GPT).spec)
ACTIVATIONS = 4 * B * T * D
KEY = jax.random.key(0)


def gradient(model: Any) -> Callable[..., Any]:
    """The gradient function of a model's loss on whole sequences."""

    def loss_fn(params: PyTree, batch: PyTree, key: Any) -> Any:
        loss = train.cross_entropy(model.apply(params, batch["x"]), batch["y"])
        return loss.value, Metrics(loss.weight)

    return jax.value_and_grad(loss_fn, has_aux=True)


def by_data(mesh: Mesh, reduce: Any) -> Any:
    """Data parallelism by ``data_parallel``."""
    return data_parallel(gradient(models.gpt(GPT)), mesh, "n", reduce=reduce)


def by_fsdp(mesh: Mesh) -> Any:
    """Everything sharded by the batch's axis."""
    return gradient(models.gpt(GPT, residual=P("n")))


def by_tensor(mesh: Mesh) -> Any:
    """Heads and hidden units divided."""
    return gradient(models.gpt(GPT, residual=P()))


def by_stages(mesh: Mesh) -> Any:
    """Layers divided."""
    layers = functools.partial(pipeline, mesh=mesh, axis="n", microbatches=MICROBATCHES)
    return gradient(models.gpt(GPT, layers=layers))


def by_sequence(mesh: Mesh) -> Any:
    """Sequences divided."""
    return gradient(models.gpt(GPT, attention=ring_attention(mesh, "n"), residual=P(None, "n")))


def kv(n: int) -> float:
    """Return C."""
    return 2 * 4 * B * T / n * GPT.groups * GPT.head_width


# The form, where parameters and the batch lie, and the least it sends.
FORMS: dict[str, tuple[Any, Any, P, Callable[[int], float]]] = {
    "data, exact": (
        functools.partial(by_data, reduce="exact"),
        {},
        P("n"),
        lambda n: 2 * (n - 1) / n * PARAMS,
    ),
    "data, fast": (
        functools.partial(by_data, reduce="fast"),
        {},
        P("n"),
        lambda n: 2 * (n - 1) / n * PARAMS,
    ),
    "fsdp": (
        by_fsdp,
        dict.fromkeys(FSDP, "n"),
        P("n"),
        lambda n: 3 * (n - 1) / n * PARAMS,
    ),
    "tensor": (
        by_tensor,
        {name: "n" for name in TENSOR if name != "vocab"},
        P(),
        lambda n: 8 * L * (n - 1) / n * ACTIVATIONS,
    ),
    "pipeline": (by_stages, {"layers": "n"}, P(), lambda n: 2.0 * ACTIVATIONS),
    "ring": (
        by_sequence,
        {},
        P(None, "n"),
        lambda n: 3 * (n - 1) * L * kv(n) + 2 * (n - 1) / n * PARAMS,
    ),
}


def compiled(name: str, n: int, params: PyTree, batch: PyTree) -> tuple[Callable[[], Any], float]:
    """Return a call of one form on n devices, and the bytes that each of them sends."""
    form, rules, lies, _ = FORMS[name]
    mesh = make_mesh({"n": n}, jax.devices()[:n])
    places = shardings(models.gpt(GPT).spec, mesh, rules)
    grad_fn = form(mesh)

    def run(params: PyTree, batch: PyTree) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return grad_fn(params, batch, KEY)

    everywhere = NamedSharding(mesh, P())
    placed = jax.device_put(params, places), jax.device_put(batch, NamedSharding(mesh, lies))
    made = jax.jit(run, out_shardings=(everywhere, places)).lower(*placed).compile()
    sent = sum(map(wire_bytes, collectives(made.as_text())))
    return lambda: made(*placed), sent


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--json", type=Path, help="where to write the table and the machine")
    options = parser.parse_args()
    tokens = np.random.default_rng(0).integers(0, GPT.vocab, (B, T + 1)).astype(np.int32)
    batch = {"x": jnp.asarray(tokens[:, :-1]), "y": jnp.asarray(tokens[:, 1:])}
    params = init(models.gpt(GPT).spec, KEY)
    plain = jax.jit(gradient(models.gpt(GPT)))
    functions: dict[str, Callable[[], Any]] = {"one device": lambda: plain(params, batch, KEY)}
    sent = {"one device": 0.0}
    for n in options.devices:
        for name in FORMS:
            functions[f"{name} {n}"], sent[f"{name} {n}"] = compiled(name, n, params, batch)
    times = turns(functions, options.rounds)
    table = Table("form", "devices", "median ms", "of one device", "KB sent", "least KB", "ratio")
    base = times["one device"]
    for label, seconds in times.items():
        form, _, n = label.rpartition(" ")
        least = FORMS[form][3](int(n)) if form in FORMS else 0.0
        ratios = [a / b for a, b in zip(seconds, base, strict=True)]
        several = form in FORMS and int(n) > 1
        table.add_row(
            form if form in FORMS else label,
            n if form in FORMS else "1",
            f"{1e3 * statistics.median(seconds):.0f}",
            f"{statistics.median(ratios):.2f}",
            f"{sent[label] / 1e3:.0f}",
            f"{least / 1e3:.0f}" if several else "",
            f"{sent[label] / least:.2f}" if several else "",
        )
    report({f"A fixed batch on more devices ({options.rounds} rounds)": table}, options.json)


if __name__ == "__main__":
    main()
