"""Haiku, as its documentation trains: a transformed function and one jitted update."""

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import optax
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
    return {"dm-haiku": hk.__version__, "jax": jax.__version__}


def training(
    problem: Problem, forward: Callable[..., jax.Array], params: Any
) -> tuple[Any, Callable]:
    """Return the state and the step of a classifier, from a function of the inputs."""
    network = hk.without_apply_rng(hk.transform(forward))
    optim = optimizer(problem.adamw)

    @jax.jit
    def update(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        def loss_fn(params: Any) -> jax.Array:
            return cross_entropy(network.apply(params, batch[0]), batch[1])

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optim.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        *state, loss = update(*state, batch)
        return state, loss

    params = jax.tree.map(jnp.asarray, params)
    return [params, optim.init(params)], step


def _gpt(problem: Problem, variant: str) -> tuple[Any, Callable]:
    config, w = problem.config, problem.weights
    D, H, M = (config[name] for name in ("width", "heads", "mlp_width"))

    def dense(size: int, name: str) -> hk.Linear:
        return hk.Linear(size, with_bias=False, name=name)

    def norm(name: str) -> hk.RMSNorm:
        return hk.RMSNorm(-1, eps=1e-6, name=name)

    def forward(tokens: jax.Array) -> jax.Array:
        x = hk.Embed(config["vocab"], D, name="embed")(tokens)
        for i in range(config["layers"]):
            y = norm(f"layer{i}_attention_norm")(x)
            names = ("query", "key", "value")
            q, k, v = (dense(D, f"layer{i}_{n}")(y).reshape(*y.shape[:2], H, -1) for n in names)
            scores = jnp.einsum("bthd,bshd->bhts", rotate(q), rotate(k)) * (D // H) ** -0.5
            seen = jnp.tril(jnp.ones(scores.shape[2:], bool))
            weights = jax.nn.softmax(jnp.where(seen, scores, -1e30))
            y = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape)
            x = x + dense(D, f"layer{i}_out")(y)
            y = norm(f"layer{i}_mlp_norm")(x)
            y = jax.nn.silu(dense(M, f"layer{i}_gate")(y)) * dense(M, f"layer{i}_up")(y)
            x = x + dense(D, f"layer{i}_down")(y)
        return dense(config["vocab"], "head")(norm("norm")(x))

    params = {"embed": {"embeddings": w["embed"]["table"]}, "norm": w["norm"]}
    params["head"] = {"w": w["head"]["kernel"]}
    for i, layer in enumerate(layers(problem)):
        for name in ("attention_norm", "mlp_norm"):
            params[f"layer{i}_{name}"] = layer[name]
        for name, kernel in (layer["attention"] | layer["mlp"]).items():
            params[f"layer{i}_{name}"] = {"w": kernel}
    return training(problem, forward, params)


gpt_small = gpt_medium = _gpt


def bert(problem: Problem, variant: str) -> tuple[Any, Callable]:
    config, embed = problem.config, problem.weights["embed"]
    D, H, M = (config[name] for name in ("width", "heads", "mlp_width"))

    def norm(name: str) -> hk.LayerNorm:
        return hk.LayerNorm(-1, True, True, eps=1e-12, name=name)

    def apply(tokens: jax.Array, types: jax.Array) -> jax.Array:
        x = hk.Embed(config["vocab"], D, name="token")(tokens)
        x = x + hk.Embed(2, D, name="type")(types)
        x = x + hk.get_parameter("position", [config["context"], D], init=jnp.zeros)
        x = norm("norm")(x)
        for i in range(config["layers"]):
            attention = hk.MultiHeadAttention(
                H, D // H, w_init=hk.initializers.Constant(0.0), name=f"layer{i}_attention"
            )
            x = norm(f"layer{i}_attention_norm")(x + attention(x, x, x))
            y = jax.nn.gelu(hk.Linear(M, name=f"layer{i}_up")(x))
            x = norm(f"layer{i}_mlp_norm")(x + hk.Linear(D, name=f"layer{i}_down")(y))
        return x

    def named(norm: dict) -> dict:
        return {"scale": norm["scale"], "offset": norm["bias"]}

    def dense(part: dict) -> dict:
        return {"w": part["kernel"], "b": part["bias"]}

    params = {name: {"embeddings": embed[name]} for name in ("token", "type")}
    params |= {"~": {"position": embed["position"]}, "norm": named(embed["norm"])}
    for i, layer in enumerate(layers(problem)):
        for ours, theirs in {
            "query": "query",
            "key": "key",
            "value": "value",
            "out": "linear",
        }.items():
            params[f"layer{i}_attention/{theirs}"] = dense(layer["attention"][ours])
        for name in ("up", "down"):
            params[f"layer{i}_{name}"] = dense(layer["mlp"][name])
        for name in ("attention_norm", "mlp_norm"):
            params[f"layer{i}_{name}"] = named(layer[name])
    network = hk.without_apply_rng(hk.transform(apply))

    @jax.jit
    def forward(params: Any, batch: Any) -> jax.Array:
        tokens, types, probe = batch
        return jnp.vdot(network.apply(params, tokens, types), probe)

    params = jax.tree.map(jnp.asarray, params)
    return params, lambda params, batch: (params, forward(params, batch))


def _named(part: dict) -> dict:
    return {"w": part["kernel"], "b": part["bias"]}


def digits_mlp(problem: Problem, variant: str) -> tuple[Any, Callable]:
    sizes = problem.config["sizes"]

    def forward(x: jax.Array) -> jax.Array:
        for i, size in enumerate(sizes[1:]):
            x = hk.Linear(size, name=f"layer{i}")(jax.nn.relu(x) if i else x)
        return x

    layers = problem.weights["layers"]
    return training(
        problem, forward, {f"layer{i}": _named(layer) for i, layer in enumerate(layers)}
    )


def cnn(problem: Problem, variant: str) -> tuple[Any, Callable]:
    def forward(x: jax.Array) -> jax.Array:
        for i, features in enumerate((32, 64)):
            x = jax.nn.relu(hk.Conv2D(features, 3, name=f"conv{i}")(x))
            x = hk.max_pool(x, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        x = jax.nn.relu(hk.Linear(128, name="layer0")(hk.Flatten()(x)))
        return hk.Linear(10, name="layer1")(x)

    w = problem.weights
    params = {f"conv{i}": _named(part) for i, part in enumerate(w["convolutions"])}
    return training(
        problem, forward, params | {f"layer{i}": _named(x) for i, x in enumerate(w["layers"])}
    )


def resnet(problem: Problem, variant: str) -> tuple[Any, Callable]:
    config, w = problem.config, problem.weights

    def conv(x: jax.Array, width: int, size: int, stride: int, name: str) -> jax.Array:
        return hk.Conv2D(width, size, stride, with_bias=False, name=name)(x)

    def norm(x: jax.Array, name: str) -> jax.Array:
        return hk.BatchNorm(True, True, 0.9, eps=1e-5, name=name)(x, is_training=True)

    def forward(x: jax.Array) -> jax.Array:
        x = jax.nn.relu(norm(conv(x, config["widths"][0], 3, 1, "stem"), "stem_norm"))
        for i, width in enumerate(config["widths"]):
            for j in range(config["blocks"][i]):
                at, stride = f"block{i}_{j}_", 2 if i and not j else 1
                y = jax.nn.relu(norm(conv(x, width, 3, stride, f"{at}conv1"), f"{at}norm1"))
                y = norm(conv(y, width, 3, 1, f"{at}conv2"), f"{at}norm2")
                if stride > 1:
                    x = norm(conv(x, width, 1, stride, f"{at}shortcut"), f"{at}shortcut_norm")
                x = jax.nn.relu(x + y)
        return hk.Linear(10, name="head")(x.mean((1, 2)))

    def offset(part: dict) -> dict:
        shape = (1, 1, 1, -1)
        return {"scale": part["scale"].reshape(shape), "offset": part["bias"].reshape(shape)}

    params = {"stem": {"w": w["stem"]["conv"]}, "stem_norm": offset(w["stem"]["norm"])}
    params["head"] = _named(w["head"])
    for i, stage in enumerate(w["stages"]):
        for j, block in enumerate(stage):
            for name, part in block.items():
                part = offset(part) if isinstance(part, dict) else {"w": part}
                params[f"block{i}_{j}_{name}"] = part
    network = hk.without_apply_rng(hk.transform_with_state(forward))
    optim = optimizer(problem.adamw)
    shown = jnp.asarray(problem.batches[0][0])
    _, statistics = jax.jit(network.init)(jax.random.key(0), shown)

    @jax.jit
    def update(params: Any, statistics: Any, opt_state: Any, batch: Any) -> tuple[Any, ...]:
        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            logits, new = network.apply(params, statistics, batch[0])
            return cross_entropy(logits, batch[1]), new

        (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optim.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), new, opt_state, loss

    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        *state, loss = update(*state, batch)
        return state, loss

    params = jax.tree.map(jnp.asarray, params)
    return [params, statistics, optim.init(params)], step
