"""Ways of dividing a GPT over devices by functions that map themselves: built small, or to compile.

Imported by the tests, and by ``compile_mapped_forms.py`` in Pythons that have little beside JAX.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fnml.core import Mean, Model, make_mesh, shardings
from fnml.models import GPTConfig, gpt
from fnml.parallel import expert_moe, ring_attention
from fnml.transforms import pipeline, remat

SMALL = GPTConfig(vocab=13, width=16, layers=4, heads=4, kv_heads=2, context=32, unroll=1)
# To compile: long enough, and of a head width, for the hand-written kernels of TPUs and Hoppers.
LONG = GPTConfig(vocab=256, width=256, layers=4, heads=2, context=4096, dtype="bfloat16", unroll=1)
SHORT = dataclasses.replace(LONG, context=256)


class Form(NamedTuple):
    """One way of dividing a GPT.

    Attributes:
      axes: of the mesh; -1 for the devices that are left.
      make: the model, from a config and a mesh.
      rules: where the parameters lie.
      tokens: how the batch is divided.
      sends: what the compiled gradient must contain.
      kernel: whether attention may be a hand-written kernel there.
      experts: how many experts a layer has.
      compiled: whether it is compiled for other hardware, which takes a minute or more where there is
        a kernel or a sort: one form with each is enough.
    """

    axes: Mapping[str, int]
    make: Callable[[GPTConfig, Any], Model]
    rules: Mapping[str, Any]
    tokens: P
    sends: str
    kernel: bool = False
    experts: int | None = None
    compiled: bool = True


def _pipeline(config, mesh, whole=False, **options):
    def layers(layer):
        layer = remat(layer, scope="whole") if whole else layer
        return pipeline(layer, mesh, microbatches=2, batch="data", **options)

    return gpt(config, layers=layers)


def _ring(config, mesh, **options):
    return gpt(config, attention=ring_attention(mesh, batch="data", **options))


def _experts(config, mesh):
    return gpt(config, experts=expert_moe(mesh, batch="data"))


def _ring_and_experts(config, mesh):
    return gpt(
        config,
        attention=ring_attention(mesh, batch="data"),
        experts=expert_moe(mesh, batch="data", sequence="sequence"),
    )


FORMS = {
    "pipeline": Form(
        {"data": -1, "stage": 4}, _pipeline, {"layers": "stage"}, P("data"), "collective-permute"
    ),
    "pipeline_remat": Form(
        {"stage": 2, "data": -1},
        functools.partial(_pipeline, whole=True),
        {"layers": "stage"},
        P("data"),
        "collective-permute",
    ),
    "pipeline_tensor": Form(
        {"data": -1, "stage": 2, "model": 2},
        _pipeline,
        {"layers": "stage", "mlp": "model", "heads": "model", "kv_heads": "model"},
        P("data"),
        "collective-permute",
    ),
    "ring": Form(
        {"data": -1, "sequence": 4},
        _ring,
        {"embed": "data"},
        P("data", "sequence"),
        "collective-permute",
        kernel=True,
    ),
    "ring_tensor": Form(
        {"data": -1, "sequence": 2, "model": 2},
        functools.partial(_ring, heads="model"),
        {"heads": "model", "kv_heads": "model", "mlp": "model"},
        P("data", "sequence"),
        "collective-permute",
        compiled=False,
    ),
    "experts": Form(
        {"data": -1, "expert": 4},
        _experts,
        {"experts": "expert"},
        P("data"),
        "all-reduce",
        experts=4,
    ),
    "ring_experts": Form(
        {"data": -1, "sequence": 2, "expert": 2},
        _ring_and_experts,
        {"experts": "expert"},
        P("data", "sequence"),
        "collective-permute",
        experts=4,
        compiled=False,
    ),
}


def configured(form: Form, config: GPTConfig) -> GPTConfig:
    """Give a config the experts that the form has."""
    return dataclasses.replace(config, experts=form.experts)


def loss_and_grads(model: Model, config: GPTConfig) -> Callable[..., Any]:
    """Return ``run(params, tokens)``: the next-token loss, with balance, and its gradients."""

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        out = model.apply(params, tokens, **({"balance": True} if config.experts else {}))
        logits, balance = out if config.experts else (out, Mean(jnp.float32(0), jnp.float32(1)))
        # Targets of the same length as the tokens: a divided sequence stays divided.
        nats = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(
            logits, jnp.roll(tokens, -1, 1)[..., None], -1
        ).squeeze(-1)
        last = lax.broadcasted_iota(jnp.int32, nats.shape, 1) == tokens.shape[1] - 1
        return jnp.mean(jnp.where(last, 0.0, nats)) + 0.01 * balance.value

    return jax.value_and_grad(loss_fn)


def divided(form: Form, config: GPTConfig, devices: Any) -> tuple[Any, Any, Any]:
    """Return the form's gradient function, and the shardings of parameters and tokens."""
    config = configured(form, config)
    mesh = make_mesh(form.axes, devices)
    model = form.make(config, mesh)
    places = shardings(model.spec, mesh, form.rules), NamedSharding(mesh, form.tokens)
    run = loss_and_grads(model, config)

    def on_mesh(params: Any, tokens: jax.Array) -> Any:
        # What no compiler can divide, a kernel outside of a mapped function, must know of the mesh.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return run(params, tokens)

    return model, on_mesh, places
