"""Recipes to plan and not to train: GPTs of the usual sizes, without data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from fnml.core import ConfigError, Metrics, Model, nearest, parse_mesh
from fnml.data import Batches, TokenSource, epoch
from fnml.models import GPTConfig, causal_attention, gpt
from fnml.recipes._recipe import FLAT, Recipe, RunConfig, Task
from fnml.train import OptimizerConfig, next_token

PyTree = Any
# [B, T, H, D / H]: sequences along data, heads along model.
_PLACES = ("data", None, "model", None)


def _model(width: int, layers: int, heads: int, mlp_width: int) -> GPTConfig:
    return GPTConfig(
        vocab=32768,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=8,
        mlp_width=mlp_width,
        context=4096,
        rope_base=500_000.0,
        dtype="bfloat16",
        unroll=1,
    )


SIZES = {
    "gpt-1b": _model(2048, 16, 16, 8192),
    "gpt-8b": _model(4096, 32, 32, 14336),
    "gpt-70b": _model(8192, 80, 64, 28672),
}
"""GPTs by name, in the proportions of Llama 3 (arXiv:2407.21783, table 3), for 32,768 tokens."""


@dataclass(frozen=True)
class GptConfig:
    """A GPT of bfloat16 activations over float32 parameters, to be planned: it has no data."""

    run: Annotated[RunConfig, FLAT] = RunConfig(
        batch_size=64, remat="nothing", mesh="data=-1", rules="fsdp"
    )
    """How the run goes."""
    optimizer: Annotated[OptimizerConfig, FLAT] = OptimizerConfig(
        learning_rate=3e-4, warmup=1000, weight_decay=0.1, b2=0.95, clip=1.0
    )
    """How parameters are updated."""
    model: Annotated[GPTConfig, FLAT] = SIZES["gpt-1b"]
    """The GPT."""


def _attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attend on each device to its sequences and its heads: no compiler divides a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return causal_attention(q, k, v)
    here = PartitionSpec(*(name if name in mesh.shape else None for name in _PLACES))
    divided = jax.shard_map(
        causal_attention, mesh=mesh, in_specs=(here, here, here), out_specs=here, check_vma=False
    )
    return divided(q, k, v)


def _build(config: GptConfig, directory: Path | None) -> Task:
    residual = PartitionSpec("data") if "data" in parse_mesh(config.run.mesh) else None
    model: Model = gpt(config.model, attention=_attention, residual=residual)

    def loss_fn(params: PyTree, batch: PyTree, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        loss = next_token(model.apply(params, batch["tokens"], key=key), batch["targets"])
        return loss.value, Metrics(loss.weight)

    source = TokenSource(np.zeros(2 * config.model.context + 1, np.uint16), config.model.context)
    return Task(
        model=model,
        loss_fn=loss_fn,
        eval_loss_fn=loss_fn,
        train=Batches(source, config.run.batch_size, seed=config.run.seed),
        held_out=lambda: epoch(source, 1),
        best=("loss", "min"),
        sample=lambda params, state, options: "",
    )


gpt_size = Recipe(GptConfig, _build)


def gpt_config(name: str) -> GptConfig:
    """Return the configuration of a GPT to plan.

    Raises:
      ConfigError: there is none of this name.

    >>> gpt_config("gpt-8b").model.width
    4096
    """
    if name not in SIZES:
        raise ConfigError(
            f"there is no GPT {name!r} to plan.{nearest(name, SIZES)} There are: {', '.join(SIZES)}"
        )
    return GptConfig(model=SIZES[name])
