"""JAX alone: each row as a textbook writes it, in plain jnp and lax over a tree of arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax_rows import cross_entropy, layers, on_device, optimizer, rotate
from problems import Problem

PyTree = Any
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
    return {"jax": jax.__version__}


def training(
    problem: Problem, apply: Callable[..., Any], params: PyTree, kept: PyTree = ()
) -> tuple[Any, Callable]:
    """Return the state and the step of ``apply(params, x) -> (logits, moments)``.

    ``kept`` are the moving averages of those moments.
    """
    rule = optimizer(problem.adamw)
    params = jax.tree.map(jnp.asarray, params)

    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        params, moments, kept = state

        def loss_fn(params: PyTree) -> tuple[jax.Array, PyTree]:
            logits, new = apply(params, batch[0])
            return cross_entropy(logits, batch[1]), new

        (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, moments = rule.update(grads, moments, params)
        kept = jax.tree.map(lambda old, now: 0.9 * old + 0.1 * now, kept, new)
        return (optax.apply_updates(params, updates), moments, kept), loss

    return (params, rule.init(params), kept), jax.jit(step, donate_argnums=0)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if causal:
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(seen, scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def _rms_norm(x: jax.Array, p: PyTree) -> jax.Array:
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["scale"]


def _gpt(problem: Problem, variant: str) -> tuple[Any, Callable]:
    heads = problem.config["heads"]

    def layer(x: jax.Array, p: PyTree) -> jax.Array:
        def split(kernel: jax.Array) -> jax.Array:
            return (y @ kernel).reshape(*y.shape[:2], heads, -1)

        y = _rms_norm(x, p["attention_norm"])
        q, k, v = (split(p["attention"][name]) for name in ("query", "key", "value"))
        mixed = _attention(rotate(q), rotate(k), v, causal=True).reshape(x.shape)
        x = x + mixed @ p["attention"]["out"]
        y, p = _rms_norm(x, p["mlp_norm"]), p["mlp"]
        return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]

    def apply(params: PyTree, tokens: jax.Array) -> tuple[jax.Array, PyTree]:
        x = params["embed"]["table"][tokens]
        for p in params["layers"]:
            x = layer(x, p)
        return _rms_norm(x, params["norm"]) @ params["head"]["kernel"], ()

    return training(problem, apply, problem.weights | {"layers": layers(problem)})


gpt_small = gpt_medium = _gpt


def _dense(x: jax.Array, p: PyTree) -> jax.Array:
    return x @ p["kernel"] + p["bias"]


def bert(problem: Problem, variant: str) -> tuple[PyTree, Callable]:
    heads = problem.config["heads"]
    params = jax.tree.map(jnp.asarray, problem.weights | {"layers": layers(problem)})

    def norm(x: jax.Array, p: PyTree) -> jax.Array:
        x = x - x.mean(-1, keepdims=True)
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-12) * p["scale"] + p["bias"]

    @jax.jit
    def forward(params: PyTree, batch: Any) -> jax.Array:
        tokens, types, probe = batch
        p = params["embed"]
        x = norm(p["token"][tokens] + p["position"] + p["type"][types], p["norm"])
        for p in params["layers"]:
            q, k, v = (
                _dense(x, p["attention"][name]).reshape(*x.shape[:2], heads, -1)
                for name in ("query", "key", "value")
            )
            mixed = _attention(q, k, v, causal=False).reshape(x.shape)
            x = norm(x + _dense(mixed, p["attention"]["out"]), p["attention_norm"])
            y = _dense(jax.nn.gelu(_dense(x, p["mlp"]["up"])), p["mlp"]["down"])
            x = norm(x + y, p["mlp_norm"])
        return jnp.vdot(x, probe)

    return params, lambda params, batch: (params, forward(params, batch))


def digits_mlp(problem: Problem, variant: str) -> tuple[Any, Callable]:
    def apply(params: PyTree, x: jax.Array) -> tuple[jax.Array, PyTree]:
        *hidden, last = params["layers"]
        for layer in hidden:
            x = jax.nn.relu(_dense(x, layer))
        return _dense(x, last), ()

    return training(problem, apply, problem.weights)


def _conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=layout)


def cnn(problem: Problem, variant: str) -> tuple[Any, Callable]:
    def apply(params: PyTree, x: jax.Array) -> tuple[jax.Array, PyTree]:
        window = (1, 2, 2, 1)
        for layer in params["convolutions"]:
            x = jax.nn.relu(_conv(x, layer["kernel"]) + layer["bias"])
            x = lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")
        first, last = params["layers"]
        return _dense(jax.nn.relu(_dense(x.reshape(len(x), -1), first)), last), ()

    return training(problem, apply, problem.weights)


def resnet(problem: Problem, variant: str) -> tuple[Any, Callable]:
    def apply(params: PyTree, x: jax.Array) -> tuple[jax.Array, PyTree]:
        moments = []

        def norm(x: jax.Array, p: PyTree) -> jax.Array:
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            moments.append(lax.stop_gradient((mean, var)))
            return (x - mean) * lax.rsqrt(var + 1e-5) * p["scale"] + p["bias"]

        x = jax.nn.relu(norm(_conv(x, params["stem"]["conv"]), params["stem"]["norm"]))
        for i, stage in enumerate(params["stages"]):
            for j, p in enumerate(stage):
                stride = 2 if i and not j else 1
                y = jax.nn.relu(norm(_conv(x, p["conv1"], stride), p["norm1"]))
                y = norm(_conv(y, p["conv2"]), p["norm2"])
                if "shortcut" in p:
                    x = norm(_conv(x, p["shortcut"], stride), p["shortcut_norm"])
                x = jax.nn.relu(x + y)
        return _dense(x.mean((1, 2)), params["head"]), moments

    weights = jax.tree.map(jnp.asarray, problem.weights)
    _, moments = jax.eval_shape(apply, weights, problem.batches[0][0])
    return training(
        problem, apply, weights, jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), moments)
    )
