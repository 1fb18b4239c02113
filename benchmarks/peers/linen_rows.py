"""flax.linen, trained as in its documentation: a TrainState and one jitted step."""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.training.train_state import TrainState
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


def training(problem: Problem, model: nn.Module, params: Any) -> tuple[TrainState, Callable]:
    """Return the state and the step of a classifier: model of the inputs, cross entropy."""
    state = TrainState.create(
        apply_fn=model.apply,
        params=jax.tree.map(jnp.asarray, params),
        tx=optimizer(problem.adamw),
    )

    @jax.jit
    def step(state: TrainState, batch: Any) -> tuple[TrainState, jax.Array]:
        def loss_fn(params: Any) -> jax.Array:
            return cross_entropy(state.apply_fn({"params": params}, batch[0]), batch[1])

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    return state, step


class _Block(nn.Module):
    config: dict

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        D, H, M = (self.config[name] for name in ("width", "heads", "mlp_width"))

        def dense(size: int, name: str) -> nn.Dense:
            return nn.Dense(size, use_bias=False, name=name)

        y = nn.RMSNorm(name="attention_norm")(x)
        q, k, v = (dense(D, n)(y).reshape(*y.shape[:2], H, -1) for n in ("query", "key", "value"))
        mask = nn.make_causal_mask(x[..., 0])
        y = nn.dot_product_attention(rotate(q), rotate(k), v, mask=mask).reshape(x.shape)
        x = x + dense(D, "out")(y)
        y = nn.RMSNorm(name="mlp_norm")(x)
        return x + dense(D, "down")(nn.silu(dense(M, "gate")(y)) * dense(M, "up")(y))


class _GPT(nn.Module):
    config: dict

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.config["vocab"], self.config["width"], name="embed")(tokens)
        for i in range(self.config["layers"]):
            x = _Block(self.config, name=f"layer{i}")(x)
        x = nn.RMSNorm(name="norm")(x)
        return nn.Dense(self.config["vocab"], use_bias=False, name="head")(x)


def _gpt(problem: Problem, variant: str) -> tuple[TrainState, Callable]:
    w = problem.weights
    params = {"embed": {"embedding": w["embed"]["table"]}, "norm": w["norm"], "head": w["head"]}
    for i, layer in enumerate(layers(problem)):
        kernels = {
            name: {"kernel": x} for part in ("attention", "mlp") for name, x in layer[part].items()
        }
        norms = {name: layer[name] for name in ("attention_norm", "mlp_norm")}
        params[f"layer{i}"] = kernels | norms
    return training(problem, _GPT(flax.core.freeze(problem.config)), params)


gpt_small = gpt_medium = _gpt


class _Layer(nn.Module):
    config: dict

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        attention = nn.MultiHeadDotProductAttention(self.config["heads"], name="attention")
        x = nn.LayerNorm(1e-12, name="attention_norm")(x + attention(x))
        y = nn.gelu(nn.Dense(self.config["mlp_width"], name="up")(x))
        y = nn.Dense(self.config["width"], name="down")(y)
        return nn.LayerNorm(1e-12, name="mlp_norm")(x + y)


class _Encoder(nn.Module):
    config: dict

    @nn.compact
    def __call__(self, tokens: jax.Array, types: jax.Array) -> jax.Array:
        D = self.config["width"]
        x = nn.Embed(self.config["vocab"], D, name="token")(tokens)
        x = x + nn.Embed(2, D, name="type")(types)
        x = x + self.param("position", nn.initializers.zeros, (self.config["context"], D))
        x = nn.LayerNorm(1e-12, name="norm")(x)
        for i in range(self.config["layers"]):
            x = _Layer(self.config, name=f"layer{i}")(x)
        return x


def bert(problem: Problem, variant: str) -> tuple[Any, Callable]:
    D, H = problem.config["width"], problem.config["heads"]
    embed = problem.weights["embed"]
    params = {name: {"embedding": embed[name]} for name in ("token", "type")}
    params |= {"position": embed["position"], "norm": embed["norm"]}
    for i, layer in enumerate(layers(problem)):
        heads = {
            name: {"kernel": part["kernel"].reshape(D, H, -1), "bias": part["bias"].reshape(H, -1)}
            for name, part in layer["attention"].items()
        }
        out = layer["attention"]["out"]
        heads["out"] = {"kernel": out["kernel"].reshape(H, -1, D), "bias": out["bias"]}
        norms = {name: layer[name] for name in ("attention_norm", "mlp_norm")}
        params[f"layer{i}"] = {"attention": heads, **layer["mlp"], **norms}
    model = _Encoder(flax.core.freeze(problem.config))

    @jax.jit
    def forward(params: Any, batch: Any) -> jax.Array:
        tokens, types, probe = batch
        return jnp.vdot(model.apply({"params": params}, tokens, types), probe)

    return jax.tree.map(jnp.asarray, params), lambda params, batch: (params, forward(params, batch))


class _MLP(nn.Module):
    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, size in enumerate(self.sizes[1:]):
            x = nn.Dense(size, name=f"layer{i}")(nn.relu(x) if i else x)
        return x


def digits_mlp(problem: Problem, variant: str) -> tuple[TrainState, Callable]:
    params = {f"layer{i}": layer for i, layer in enumerate(problem.weights["layers"])}
    return training(problem, _MLP(problem.config["sizes"]), params)


class _CNN(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, features in enumerate((32, 64)):
            x = nn.relu(nn.Conv(features, (3, 3), name=f"conv{i}")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(128, name="layer0")(x.reshape(len(x), -1)))
        return nn.Dense(10, name="layer1")(x)


def cnn(problem: Problem, variant: str) -> tuple[TrainState, Callable]:
    params = {f"conv{i}": part for i, part in enumerate(problem.weights["convolutions"])}
    params |= {f"layer{i}": layer for i, layer in enumerate(problem.weights["layers"])}
    return training(problem, _CNN(), params)


class _ResNet(nn.Module):
    config: dict

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def conv(x: jax.Array, width: int, size: int, stride: int, name: str) -> jax.Array:
            return nn.Conv(width, (size, size), (stride, stride), use_bias=False, name=name)(x)

        def norm(x: jax.Array, name: str) -> jax.Array:
            return nn.BatchNorm(False, momentum=0.9, epsilon=1e-5, name=name)(x)

        x = nn.relu(norm(conv(x, self.config["widths"][0], 3, 1, "stem"), "stem_norm"))
        for i, width in enumerate(self.config["widths"]):
            for j in range(self.config["blocks"][i]):
                at, stride = f"block{i}_{j}_", 2 if i and not j else 1
                y = nn.relu(norm(conv(x, width, 3, stride, f"{at}conv1"), f"{at}norm1"))
                y = norm(conv(y, width, 3, 1, f"{at}conv2"), f"{at}norm2")
                if stride > 1:
                    x = conv(x, width, 1, stride, f"{at}shortcut")
                    x = norm(x, f"{at}shortcut_norm")
                x = nn.relu(x + y)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def resnet(problem: Problem, variant: str) -> tuple[Any, Callable]:
    w = problem.weights
    params = {"stem": {"kernel": w["stem"]["conv"]}, "stem_norm": w["stem"]["norm"]}
    params["head"] = w["head"]
    for i, stage in enumerate(w["stages"]):
        for j, block in enumerate(stage):
            for name, part in block.items():
                part = part if isinstance(part, dict) else {"kernel": part}
                params[f"block{i}_{j}_{name}"] = part
    model = _ResNet(flax.core.freeze(problem.config))
    shown = jnp.asarray(problem.batches[0][0])
    statistics = jax.jit(model.init)(jax.random.key(0), shown)["batch_stats"]
    state = TrainState.create(
        apply_fn=model.apply,
        params=jax.tree.map(jnp.asarray, params),
        tx=optimizer(problem.adamw),
    )

    @jax.jit
    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        state, statistics = state

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": statistics}
            logits, changed = state.apply_fn(variables, batch[0], mutable=["batch_stats"])
            return cross_entropy(logits, batch[1]), changed["batch_stats"]

        (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return (state.apply_gradients(grads=grads), new), loss

    return (state, statistics), step
