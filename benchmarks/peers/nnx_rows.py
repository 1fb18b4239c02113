"""flax.nnx, both ways of its documentation: nnx.jit, or jax.jit around split and merge."""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import nnx
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


def versions() -> dict[str, str]:
    return {"flax": flax.__version__, "jax": jax.__version__}


def training(problem: Problem, model: nnx.Module, variant: str) -> tuple[Any, Callable]:
    """Return the state and the step of a classifier; ``variant`` is "nnx.jit" or "jax.jit"."""

    def update(model: nnx.Module, optimizer: nnx.Optimizer, batch: Any) -> jax.Array:
        def loss_fn(model: Any) -> jax.Array:
            return cross_entropy(model(batch[0]), batch[1])

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    both = (model, nnx.Optimizer(model, optimizer(problem.adamw), wrt=nnx.Param))
    if variant == "nnx.jit":
        jitted = nnx.jit(update)
        return both, lambda both, batch: (both, jitted(*both, batch))
    graph, state = nnx.split(both)

    @jax.jit
    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        both = nnx.merge(graph, state)
        loss = update(*both, batch)
        return nnx.state(both), loss

    return state, step


def _load(module: Any, **arrays: Any) -> Any:
    for name, x in arrays.items():
        variable = getattr(module, name)
        variable.set_value(jnp.asarray(x).reshape(variable.shape))
    return module


def dense(kernel: Any, bias: Any = None) -> nnx.Linear:
    layer = nnx.Linear(*kernel.shape, use_bias=bias is not None, rngs=nnx.Rngs(0))
    return _load(layer, kernel=kernel, **({} if bias is None else {"bias": bias}))


class _Block(nnx.Module):
    def __init__(self, config: dict, w: dict) -> None:
        D, self.heads = config["width"], config["heads"]
        for name, kernel in (w["attention"] | w["mlp"]).items():
            setattr(self, name, dense(kernel))
        for name in ("attention_norm", "mlp_norm"):
            setattr(self, name, _load(nnx.RMSNorm(D, rngs=nnx.Rngs(0)), scale=w[name]["scale"]))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.attention_norm(x)
        q, k, v = (
            layer(y).reshape(*y.shape[:2], self.heads, -1)
            for layer in (self.query, self.key, self.value)
        )
        mask = nnx.make_causal_mask(x[..., 0])
        y = nnx.dot_product_attention(rotate(q), rotate(k), v, mask=mask).reshape(x.shape)
        x = x + self.out(y)
        y = self.mlp_norm(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class _GPT(nnx.Module):
    def __init__(self, problem: Problem) -> None:
        config, w = problem.config, problem.weights
        V, D, rngs = config["vocab"], config["width"], nnx.Rngs(0)
        self.embed = _load(nnx.Embed(V, D, rngs=rngs), embedding=w["embed"]["table"])
        self.blocks = nnx.List([_Block(config, layer) for layer in layers(problem)])
        self.norm = _load(nnx.RMSNorm(D, rngs=rngs), scale=w["norm"]["scale"])
        self.head = dense(w["head"]["kernel"])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _gpt(problem: Problem, variant: str) -> tuple[Any, Callable]:
    return training(problem, _GPT(problem), variant)


gpt_small = gpt_medium = _gpt


def norm(w: dict) -> nnx.LayerNorm:
    return _load(nnx.LayerNorm(w["scale"].size, epsilon=1e-12, rngs=nnx.Rngs(0)), **w)


class _Layer(nnx.Module):
    def __init__(self, config: dict, w: dict) -> None:
        D = config["width"]
        self.attention = nnx.MultiHeadAttention(config["heads"], D, decode=False, rngs=nnx.Rngs(0))
        for name, part in w["attention"].items():
            _load(getattr(self.attention, name), **part)
        self.attention_norm, self.mlp_norm = norm(w["attention_norm"]), norm(w["mlp_norm"])
        self.up, self.down = dense(**w["mlp"]["up"]), dense(**w["mlp"]["down"])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.attention_norm(x + self.attention(x))
        return self.mlp_norm(x + self.down(nnx.gelu(self.up(x))))


class _Encoder(nnx.Module):
    def __init__(self, problem: Problem) -> None:
        embed = problem.weights["embed"]
        for name in ("token", "type"):
            layer = nnx.Embed(*embed[name].shape, rngs=nnx.Rngs(0))
            setattr(self, name, _load(layer, embedding=embed[name]))
        self.position = nnx.Param(jnp.asarray(embed["position"]))
        self.norm = norm(embed["norm"])
        self.layers = nnx.List([_Layer(problem.config, layer) for layer in layers(problem)])

    def __call__(self, tokens: jax.Array, types: jax.Array) -> jax.Array:
        x = self.norm(self.token(tokens) + self.type(types) + self.position[...])
        for layer in self.layers:
            x = layer(x)
        return x


def bert(problem: Problem, variant: str) -> tuple[Any, Callable]:
    def forward(model: Any, batch: Any) -> jax.Array:
        tokens, types, probe = batch
        return jnp.vdot(model(tokens, types), probe)

    model = _Encoder(problem)
    if variant == "nnx.jit":
        jitted = nnx.jit(forward)
        return model, lambda model, batch: (model, jitted(model, batch))
    graph, state = nnx.split(model)
    merged = jax.jit(lambda state, batch: forward(nnx.merge(graph, state), batch))
    return state, lambda state, batch: (state, merged(state, batch))


class _MLP(nnx.Module):
    def __init__(self, problem: Problem) -> None:
        self.layers = nnx.List([dense(**layer) for layer in problem.weights["layers"]])

    def __call__(self, x: jax.Array) -> jax.Array:
        first, *others = self.layers
        x = first(x)
        for layer in others:
            x = layer(nnx.relu(x))
        return x


def digits_mlp(problem: Problem, variant: str) -> tuple[Any, Callable]:
    return training(problem, _MLP(problem), variant)


def _conv(kernel: Any, bias: Any = None, stride: int = 1) -> nnx.Conv:
    *size, inputs, outputs = kernel.shape
    layer = nnx.Conv(inputs, outputs, size, stride, use_bias=bias is not None, rngs=nnx.Rngs(0))
    return _load(layer, kernel=kernel, **({} if bias is None else {"bias": bias}))


class _CNN(nnx.Module):
    def __init__(self, problem: Problem) -> None:
        self.convolutions = nnx.List([_conv(**part) for part in problem.weights["convolutions"]])
        self.layers = nnx.List([dense(**layer) for layer in problem.weights["layers"]])

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in self.convolutions:
            x = nnx.max_pool(nnx.relu(conv(x)), (2, 2), (2, 2))
        return self.layers[1](nnx.relu(self.layers[0](x.reshape(len(x), -1))))


def cnn(problem: Problem, variant: str) -> tuple[Any, Callable]:
    return training(problem, _CNN(problem), variant)


def _batch_norm(part: dict) -> nnx.BatchNorm:
    layer = nnx.BatchNorm(part["scale"].size, momentum=0.9, epsilon=1e-5, rngs=nnx.Rngs(0))
    return _load(layer, **part)


class _Residual(nnx.Module):
    def __init__(self, w: dict, stride: int) -> None:
        self.conv1, self.norm1 = _conv(w["conv1"], stride=stride), _batch_norm(w["norm1"])
        self.conv2, self.norm2 = _conv(w["conv2"]), _batch_norm(w["norm2"])
        self.changes = "shortcut" in w
        if self.changes:
            self.shortcut = _conv(w["shortcut"], stride=stride)
            self.shortcut_norm = _batch_norm(w["shortcut_norm"])

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        return nnx.relu((self.shortcut_norm(self.shortcut(x)) if self.changes else x) + y)


class _ResNet(nnx.Module):
    def __init__(self, problem: Problem) -> None:
        w = problem.weights
        self.stem, self.stem_norm = _conv(w["stem"]["conv"]), _batch_norm(w["stem"]["norm"])
        self.blocks = nnx.List(
            [
                _Residual(block, 2 if i and not j else 1)
                for i, stage in enumerate(w["stages"])
                for j, block in enumerate(stage)
            ]
        )
        self.head = dense(**w["head"])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem_norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def resnet(problem: Problem, variant: str) -> tuple[Any, Callable]:
    return training(problem, _ResNet(problem), variant)
