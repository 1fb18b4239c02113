"""The models of ``rows.py`` as a textbook writes them: jnp and lax, and autodiff for the rest.

Parameters are those of fnml's models, so that both forms take the same tree. Layers that lie stacked
are run by the same ``lax.scan`` in both, so that what differs is how a layer is written.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PyTree = Any


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Average the cross entropy of logits [..., V] and labels [...]."""
    logs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(logs, labels[..., None], -1).mean()


def attend(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    """Return softmax(q . k / sqrt(D)) v of heads [B, T, H, D], by the whole matrix of scores."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    if causal:
        length = scores.shape[-1]
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
    weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(q.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    full = x.astype(jnp.float32)
    full = full / jnp.sqrt(jnp.mean(full**2, -1, keepdims=True) + 1e-6)
    return (full * scale).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    full = x.astype(jnp.float32)
    centred = full - full.mean(-1, keepdims=True)
    full = centred / jnp.sqrt(full.var(-1, keepdims=True) + 1e-12)
    return (full * scale + bias).astype(x.dtype)


def rotate(x: jax.Array) -> jax.Array:
    """Give heads [B, T, H, D] their rotary positions, halves paired."""
    T, D = x.shape[1], x.shape[3]
    angles = jnp.arange(T)[:, None] * 10000.0 ** (-jnp.arange(0, D, 2) / D)
    cos, sin = (f(angles)[:, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    low, high = x[..., : D // 2], x[..., D // 2 :]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1)


def gpt(config: Any, params: PyTree, tokens: jax.Array) -> jax.Array:
    """Return the logits [B, T, V] of tokens [B, T]."""
    dtype = config.dtype or "float32"

    def layer(x: jax.Array, p: PyTree) -> tuple[jax.Array, None]:
        B, T, D = x.shape

        def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return (x @ kernel.reshape(D, -1).astype(dtype)).reshape(B, T, *kernel.shape[1:])

        y = rms_norm(x, p["attention_norm"]["scale"])
        q, k, v = (project(y, p["attention"][name]) for name in ("query", "key", "value"))
        y = attend(rotate(q), rotate(k), v, causal=True).reshape(x.shape)
        x = x + y @ p["attention"]["out"].reshape(D, D).astype(dtype)
        y = rms_norm(x, p["mlp_norm"]["scale"])
        y = jax.nn.silu(project(y, p["mlp"]["gate"])) * project(y, p["mlp"]["up"])
        return x + y @ p["mlp"]["down"].astype(dtype), None

    x = params["embed"]["table"][tokens].astype(dtype)
    x, _ = lax.scan(layer, x, params["layers"], unroll=min(config.unroll, config.layers))
    x = rms_norm(x, params["norm"]["scale"])
    return jnp.matmul(x, params["head"]["kernel"].astype(dtype), preferred_element_type="float32")


def encoder(config: Any, params: PyTree, tokens: jax.Array) -> jax.Array:
    """Return the last hidden states [B, T, D] of tokens [B, T]."""
    dtype = config.dtype or "float32"

    def dense(x: jax.Array, p: PyTree) -> jax.Array:
        kernel, bias = p["kernel"].astype(dtype), p["bias"].astype(dtype)
        return x @ kernel.reshape(x.shape[-1], -1) + bias.reshape(-1)

    def layer(x: jax.Array, p: PyTree) -> tuple[jax.Array, None]:
        def heads(name: str) -> jax.Array:
            return dense(x, p["attention"][name]).reshape(*x.shape[:2], config.heads, -1)

        y = attend(*map(heads, ("query", "key", "value")), causal=False).reshape(x.shape)
        x = layer_norm(x + dense(y, p["attention"]["out"]), **p["attention_norm"])
        y = dense(jax.nn.gelu(dense(x, p["mlp"]["up"]), approximate=True), p["mlp"]["down"])
        return layer_norm(x + y, **p["mlp_norm"]), None

    tables = params["embed"]
    x = tables["token"][tokens] + tables["position"][: tokens.shape[1]]
    x = layer_norm(x.astype(dtype), **tables["norm"])
    x, _ = lax.scan(layer, x, params["layers"], unroll=min(config.unroll, config.layers))
    return x.astype(jnp.float32)


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def max_pool(x: jax.Array) -> jax.Array:
    """Return the maximum of windows of 2 x 2."""
    window = (1, 2, 2, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")


def batch_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, PyTree]:
    """Normalise by the batch; return its moments for the running averages too."""
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    y = (x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias
    return y, lax.stop_gradient({"mean": mean, "square": variance + mean**2})


def cnn(params: PyTree, x: jax.Array) -> jax.Array:
    """Return the logits of images [B, H, W, C]: convolutions, each with pooling, and two layers."""
    for layer in params["convolutions"]:
        x = max_pool(jax.nn.relu(convolve(x, layer["kernel"]) + layer["bias"]))
    first, last = params["layers"]
    x = jax.nn.relu(x.reshape(len(x), -1) @ first["kernel"] + first["bias"])
    return x @ last["kernel"] + last["bias"]


def resnet(params: PyTree, x: jax.Array) -> tuple[jax.Array, PyTree]:
    """Return the logits of images [B, H, W, C], and the moments of every norm."""
    moments: PyTree = {"stem": {}, "stages": []}
    x, moments["stem"]["norm"] = batch_norm(
        convolve(x, params["stem"]["conv"]), **params["stem"]["norm"]
    )
    x = jax.nn.relu(x)
    for i, stage in enumerate(params["stages"]):
        moments["stages"].append([])
        for j, p in enumerate(stage):
            stride, found = 2 if i and not j else 1, {}
            y, found["norm1"] = batch_norm(convolve(x, p["conv1"], stride), **p["norm1"])
            y, found["norm2"] = batch_norm(convolve(jax.nn.relu(y), p["conv2"]), **p["norm2"])
            if "shortcut" in p:
                x = convolve(x, p["shortcut"], stride)
                x, found["shortcut_norm"] = batch_norm(x, **p["shortcut_norm"])
            x = jax.nn.relu(x + y)
            moments["stages"][-1].append(found)
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"], moments
