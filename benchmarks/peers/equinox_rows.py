"""Equinox, as its documentation trains: modules mapped by vmap, filter_jit, filter_value_and_grad."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax_rows import cross_entropy, layers, on_device, optimizer, rotate
from problems import Problem

value = float
__all__ = [
    "bert",
    "cnn",
    "digits_mlp",
    "gpt_medium",
    "gpt_small",
    "on_device",
    "resnet",
    "value",
    "versions",
]
_KEY = jax.random.key(0)


def versions() -> dict[str, str]:
    return {"equinox": eqx.__version__, "jax": jax.__version__}


def training(problem: Problem, model: eqx.Module) -> tuple[Any, Callable]:
    """Return the state and the step of a classifier of one example."""
    optim = optimizer(problem.adamw)

    @eqx.filter_jit
    def update(model: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        @eqx.filter_value_and_grad
        def loss_fn(model: Any) -> jax.Array:
            return cross_entropy(jax.vmap(model)(batch[0]), batch[1])

        loss, grads = loss_fn(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = optim.update(grads, opt_state, params)
        return eqx.apply_updates(model, updates), opt_state, loss

    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        *state, loss = update(*state, batch)
        return state, loss

    return [model, optim.init(eqx.filter(model, eqx.is_inexact_array))], step


def _load(module: Any, **arrays: Any) -> Any:
    """Set arrays of a module; kernels [inputs, outputs] become Equinox' [outputs, inputs]."""
    if isinstance(module, eqx.nn.Linear):
        arrays["weight"] = arrays["weight"].T
    names = list(arrays)
    values = [jnp.asarray(arrays[name]) for name in names]
    return eqx.tree_at(lambda m: [getattr(m, name) for name in names], module, values)


def dense(kernel: Any, bias: Any = None) -> eqx.nn.Linear:
    layer = eqx.nn.Linear(*kernel.shape, use_bias=bias is not None, key=_KEY)
    return _load(layer, weight=kernel, **({} if bias is None else {"bias": bias}))


class _Block(eqx.Module):
    heads: int
    linears: dict[str, eqx.nn.Linear]
    norms: dict[str, eqx.nn.RMSNorm]

    def __init__(self, config: dict, w: dict) -> None:
        self.heads = config["heads"]
        self.linears = {name: dense(x) for name, x in (w["attention"] | w["mlp"]).items()}
        self.norms = {
            name: _load(
                eqx.nn.RMSNorm(config["width"], eps=1e-6, use_bias=False), weight=w[name]["scale"]
            )
            for name in ("attention_norm", "mlp_norm")
        }

    def __call__(self, x: jax.Array) -> jax.Array:
        linear = {name: jax.vmap(layer) for name, layer in self.linears.items()}
        y = jax.vmap(self.norms["attention_norm"])(x)
        q, k, v = (
            linear[name](y).reshape(x.shape[0], self.heads, -1)
            for name in ("query", "key", "value")
        )
        q, k = rotate(q[None])[0], rotate(k[None])[0]
        x = x + linear["out"](
            jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        )
        y = jax.vmap(self.norms["mlp_norm"])(x)
        return x + linear["down"](jax.nn.silu(linear["gate"](y)) * linear["up"](y))


class _GPT(eqx.Module):
    embed: eqx.nn.Embedding
    blocks: list[_Block]
    norm: eqx.nn.RMSNorm
    head: eqx.nn.Linear

    def __init__(self, problem: Problem) -> None:
        config, w = problem.config, problem.weights
        self.embed = eqx.nn.Embedding(weight=jnp.asarray(w["embed"]["table"]))
        self.blocks = [_Block(config, layer) for layer in layers(problem)]
        norm = eqx.nn.RMSNorm(config["width"], eps=1e-6, use_bias=False)
        self.norm = _load(norm, weight=w["norm"]["scale"])
        self.head = dense(w["head"]["kernel"])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = jax.vmap(self.embed)(tokens)
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x))


def _gpt(problem: Problem, variant: str) -> tuple[Any, Callable]:
    return training(problem, _GPT(problem))


gpt_small = gpt_medium = _gpt


def norm(w: dict) -> eqx.nn.LayerNorm:
    return _load(eqx.nn.LayerNorm(w["scale"].size, eps=1e-12), weight=w["scale"], bias=w["bias"])


class _Layer(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    linears: list[eqx.nn.Linear]
    norms: list[eqx.nn.LayerNorm]

    def __init__(self, config: dict, w: dict) -> None:
        uses = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
        attention = eqx.nn.MultiheadAttention(config["heads"], config["width"], key=_KEY, **uses)
        names = {"query": "query", "key": "key", "value": "value", "out": "output"}
        loaded = {f"{n}_proj": dense(**w["attention"][ours]) for ours, n in names.items()}
        self.attention = _replace(attention, loaded)
        self.linears = [dense(**w["mlp"][name]) for name in ("up", "down")]
        self.norms = [norm(w[name]) for name in ("attention_norm", "mlp_norm")]

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.vmap(self.norms[0])(x + self.attention(x, x, x))
        up, down = map(jax.vmap, self.linears)
        return jax.vmap(self.norms[1])(x + down(jax.nn.gelu(up(x))))


def _replace(module: Any, parts: dict[str, Any]) -> Any:
    return eqx.tree_at(lambda m: [getattr(m, name) for name in parts], module, list(parts.values()))


class _Encoder(eqx.Module):
    token: eqx.nn.Embedding
    type: eqx.nn.Embedding
    position: jax.Array
    norm: eqx.nn.LayerNorm
    layers: list[_Layer]

    def __init__(self, problem: Problem) -> None:
        embed = problem.weights["embed"]
        self.token = eqx.nn.Embedding(weight=jnp.asarray(embed["token"]))
        self.type = eqx.nn.Embedding(weight=jnp.asarray(embed["type"]))
        self.position = jnp.asarray(embed["position"])
        self.norm = norm(embed["norm"])
        self.layers = [_Layer(problem.config, layer) for layer in layers(problem)]

    def __call__(self, tokens: jax.Array, types: jax.Array) -> jax.Array:
        x = jax.vmap(self.token)(tokens) + jax.vmap(self.type)(types) + self.position
        x = jax.vmap(self.norm)(x)
        for layer in self.layers:
            x = layer(x)
        return x


def bert(problem: Problem, variant: str) -> tuple[Any, Callable]:
    @eqx.filter_jit
    def forward(model: Any, batch: Any) -> jax.Array:
        tokens, types, probe = batch
        return jnp.vdot(jax.vmap(model)(tokens, types), probe)

    return _Encoder(problem), lambda model, batch: (model, forward(model, batch))


class _MLP(eqx.Module):
    layers: list[eqx.nn.Linear]

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = layer(jax.nn.relu(x))
        return x


def digits_mlp(problem: Problem, variant: str) -> tuple[Any, Callable]:
    return training(problem, _MLP([dense(**layer) for layer in problem.weights["layers"]]))


def _conv(kernel: Any, bias: Any = None, stride: int = 1) -> eqx.nn.Conv2d:
    size, _, inputs, outputs = kernel.shape
    layer = eqx.nn.Conv2d(
        inputs, outputs, size, stride, "SAME", use_bias=bias is not None, key=_KEY
    )
    loaded = {} if bias is None else {"bias": bias.reshape(-1, 1, 1)}
    return _load(layer, weight=kernel.transpose(3, 2, 0, 1), **loaded)


class _CNN(eqx.Module):
    convolutions: list[eqx.nn.Conv2d]
    layers: list[eqx.nn.Linear]

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.transpose(2, 0, 1)
        for conv in self.convolutions:
            x = eqx.nn.MaxPool2d(2, 2)(jax.nn.relu(conv(x)))
        x = jax.nn.relu(self.layers[0](x.transpose(1, 2, 0).reshape(-1)))
        return self.layers[1](x)


def cnn(problem: Problem, variant: str) -> tuple[Any, Callable]:
    convolutions = [_conv(**part) for part in problem.weights["convolutions"]]
    return training(
        problem, _CNN(convolutions, [dense(**layer) for layer in problem.weights["layers"]])
    )


def _batch_norm(part: dict) -> eqx.nn.BatchNorm:
    layer = eqx.nn.BatchNorm(part["scale"].size, "batch", eps=1e-5, momentum=0.9, mode="batch")
    return _load(layer, weight=part["scale"], bias=part["bias"])


class _Residual(eqx.Module):
    convolutions: list[eqx.nn.Conv2d]
    norms: list[eqx.nn.BatchNorm]

    def __init__(self, w: dict, stride: int) -> None:
        names = ["1", "2"] + ["shortcut"] * ("shortcut" in w)
        kernels = [w[n if n == "shortcut" else f"conv{n}"] for n in names]
        strides = (stride, 1, stride)
        self.convolutions = [_conv(k, stride=s) for k, s in zip(kernels, strides, strict=False)]
        norms = [w["shortcut_norm" if n == "shortcut" else f"norm{n}"] for n in names]
        self.norms = [_batch_norm(part) for part in norms]

    def __call__(self, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        y, state = self.norms[0](self.convolutions[0](x), state)
        y, state = self.norms[1](self.convolutions[1](jax.nn.relu(y)), state)
        if len(self.norms) == 3:
            x, state = self.norms[2](self.convolutions[2](x), state)
        return jax.nn.relu(x + y), state


class _ResNet(eqx.Module):
    stem: eqx.nn.Conv2d
    stem_norm: eqx.nn.BatchNorm
    blocks: list[_Residual]
    head: eqx.nn.Linear

    def __init__(self, problem: Problem) -> None:
        w = problem.weights
        self.stem, self.stem_norm = _conv(w["stem"]["conv"]), _batch_norm(w["stem"]["norm"])
        self.blocks = [
            _Residual(block, 2 if i and not j else 1)
            for i, stage in enumerate(w["stages"])
            for j, block in enumerate(stage)
        ]
        self.head = dense(**w["head"])

    def __call__(self, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        x, state = self.stem_norm(self.stem(x.transpose(2, 0, 1)), state)
        x = jax.nn.relu(x)
        for block in self.blocks:
            x, state = block(x, state)
        return self.head(x.mean((1, 2))), state


def resnet(problem: Problem, variant: str) -> tuple[Any, Callable]:
    model, statistics = eqx.nn.make_with_state(_ResNet)(problem)
    optim = optimizer(problem.adamw)

    @eqx.filter_jit
    def update(model: Any, statistics: Any, opt_state: Any, batch: Any) -> tuple[Any, ...]:
        def loss_fn(model: Any) -> tuple[jax.Array, Any]:
            mapped = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
            logits, new = mapped(batch[0], statistics)
            return cross_entropy(logits, batch[1]), new

        (loss, new), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = optim.update(grads, opt_state, params)
        return eqx.apply_updates(model, updates), new, opt_state, loss

    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        *state, loss = update(*state, batch)
        return state, loss

    return [model, statistics, optim.init(eqx.filter(model, eqx.is_inexact_array))], step
