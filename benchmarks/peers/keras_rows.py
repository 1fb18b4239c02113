"""Keras on JAX, trained by the jitted stateless loop of its guide to JAX."""

import os

os.environ["KERAS_BACKEND"] = "jax"

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax_rows import layers, on_device, rotate
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
    return {"keras": keras.__version__, "jax": jax.__version__}


class _AdamW(keras.optimizers.AdamW):
    """Keras' AdamW with epsilon added after the second moment's bias is corrected, and not before."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        epsilon, steps = self.epsilon, keras.ops.cast(self.iterations + 1, variable.dtype)
        self.epsilon = epsilon * keras.ops.sqrt(1 - keras.ops.power(self.beta_2, steps))
        super().update_step(gradient, variable, learning_rate)
        self.epsilon = epsilon


def training(problem: Problem, model: keras.Model) -> tuple[Any, Callable]:
    """Return the state and the step of a classifier."""
    rate, b1, b2, eps, weight_decay = problem.adamw
    optimizer = _AdamW(rate, weight_decay=weight_decay, beta_1=b1, beta_2=b2, epsilon=eps)
    optimizer.build(model.trainable_variables)
    crossed = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def loss_fn(trainable: Any, other: Any, batch: Any) -> tuple[jax.Array, Any]:
        logits, other = model.stateless_call(trainable, other, batch[0], training=True)
        return crossed(batch[1], logits), other

    @jax.jit
    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        trainable, other, moments = state
        (loss, other), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable, other, batch)
        trainable, moments = optimizer.stateless_apply(moments, grads, trainable)
        return (trainable, other, moments), loss

    variables = (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
    return tuple([v.value for v in group] for group in variables), step


def _gpt(problem: Problem, variant: str) -> tuple[Any, Callable]:
    config, w = problem.config, problem.weights
    D, H, T = (config[name] for name in ("width", "heads", "context"))
    made: list[tuple[Any, list]] = []

    def layer(layer: Any, *arrays: Any) -> Any:
        made.append((layer, list(arrays)))
        return layer

    def dense(kernel: Any) -> Any:
        return layer(keras.layers.Dense(kernel.shape[1], use_bias=False), kernel)

    def norm(part: dict) -> Any:
        return layer(keras.layers.RMSNormalization(epsilon=1e-6), part["scale"])

    class Attention(keras.layers.Layer):
        def call(self, q: Any, k: Any, v: Any) -> Any:
            q, k, v = (keras.ops.reshape(x, (-1, T, H, D // H)) for x in (q, k, v))
            y = keras.ops.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            return keras.ops.reshape(y, (-1, T, D))

    tokens = keras.Input((T,), dtype="int32")
    x = layer(keras.layers.Embedding(config["vocab"], D), w["embed"]["table"])(tokens)
    for part in layers(problem):
        y = norm(part["attention_norm"])(x)
        q, k, v = (dense(part["attention"][name])(y) for name in ("query", "key", "value"))
        x = x + dense(part["attention"]["out"])(Attention()(q, k, v))
        y = norm(part["mlp_norm"])(x)
        y = keras.ops.silu(dense(part["mlp"]["gate"])(y)) * dense(part["mlp"]["up"])(y)
        x = x + dense(part["mlp"]["down"])(y)
    logits = dense(w["head"]["kernel"])(norm(w["norm"])(x))
    model = keras.Model(tokens, logits)
    for part, arrays in made:
        part.set_weights(arrays)
    return training(problem, model)


gpt_small = gpt_medium = _gpt


def bert(problem: Problem, variant: str) -> tuple[Any, Callable]:
    config, embed = problem.config, problem.weights["embed"]
    V, D, H, T = (config[name] for name in ("vocab", "width", "heads", "context"))
    made: list[tuple[Any, list]] = []

    def layer(layer: Any, *arrays: Any) -> Any:
        made.append((layer, list(arrays)))
        return layer

    def norm(part: dict) -> Any:
        return layer(keras.layers.LayerNormalization(epsilon=1e-12), part["scale"], part["bias"])

    def dense(part: dict, **options: Any) -> Any:
        size = part["bias"].size
        return layer(keras.layers.Dense(size, **options), part["kernel"], part["bias"])

    def attention(parts: dict) -> Any:
        arrays = []
        for name in ("query", "key", "value"):
            part = parts[name]
            arrays += [part["kernel"].reshape(D, H, -1), part["bias"].reshape(H, -1)]
        arrays += [parts["out"]["kernel"].reshape(H, -1, D), parts["out"]["bias"]]
        return layer(keras.layers.MultiHeadAttention(H, D // H), *arrays)

    class Positions(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.table = self.add_weight(shape=shape[1:])

        def call(self, x: Any) -> Any:
            return x + self.table

    tokens, types = (keras.Input((T,), dtype="int32") for _ in range(2))
    x = layer(keras.layers.Embedding(V, D), embed["token"])(tokens)
    x = x + layer(keras.layers.Embedding(2, D), embed["type"])(types)
    x = layer(Positions(), embed["position"])(x)
    x = norm(embed["norm"])(x)
    for part in layers(problem):
        x = norm(part["attention_norm"])(x + attention(part["attention"])(x, x))
        y = dense(part["mlp"]["up"])(x)
        y = dense(part["mlp"]["down"])(keras.activations.gelu(y, approximate=True))
        x = norm(part["mlp_norm"])(x + y)
    model = keras.Model([tokens, types], x)
    for part, arrays in made:
        part.set_weights(arrays)

    @jax.jit
    def forward(variables: Any, batch: Any) -> jax.Array:
        tokens, types, probe = batch
        hidden, _ = model.stateless_call(*variables, [tokens, types], training=False)
        return jnp.vdot(hidden, probe)

    groups = (model.trainable_variables, model.non_trainable_variables)
    variables = tuple([v.value for v in group] for group in groups)
    return variables, lambda variables, batch: (variables, forward(variables, batch))


def digits_mlp(problem: Problem, variant: str) -> tuple[Any, Callable]:
    sizes, layers = problem.config["sizes"], problem.weights["layers"]
    made = [keras.layers.Dense(n, "relu" if n != sizes[-1] else None) for n in sizes[1:]]
    model = keras.Sequential([keras.Input((sizes[0],)), *made])
    for layer, part in zip(made, layers, strict=True):
        layer.set_weights([part["kernel"], part["bias"]])
    return training(problem, model)


def cnn(problem: Problem, variant: str) -> tuple[Any, Callable]:
    pictures = x = keras.Input((28, 28, 1))
    parts = problem.weights["convolutions"] + problem.weights["layers"]
    made = [keras.layers.Conv2D(n, 3, padding="same", activation="relu") for n in (32, 64)]
    made += [keras.layers.Dense(128, "relu"), keras.layers.Dense(10)]
    for layer in made[:2]:
        x = keras.layers.MaxPooling2D(2)(layer(x))
    model = keras.Model(pictures, made[3](made[2](keras.layers.Flatten()(x))))
    for layer, part in zip(made, parts, strict=True):
        layer.set_weights([part["kernel"], part["bias"]])
    return training(problem, model)


def resnet(problem: Problem, variant: str) -> tuple[Any, Callable]:
    w = problem.weights
    made: list[tuple[Any, list]] = []

    def layer(layer: Any, *arrays: Any) -> Any:
        made.append((layer, list(arrays)))
        return layer

    def conv(kernel: Any, stride: int = 1) -> Any:
        size, _, _, width = kernel.shape
        options = {"padding": "same", "use_bias": False}
        return layer(keras.layers.Conv2D(width, size, stride, **options), kernel)

    def norm(part: dict) -> Any:
        new = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)
        moments = jnp.zeros_like(part["scale"]), jnp.ones_like(part["scale"])
        return layer(new, part["scale"], part["bias"], *moments)

    pictures = keras.Input((32, 32, 3))
    x = keras.ops.relu(norm(w["stem"]["norm"])(conv(w["stem"]["conv"])(pictures)))
    for i, stage in enumerate(w["stages"]):
        for j, block in enumerate(stage):
            stride = 2 if i and not j else 1
            y = keras.ops.relu(norm(block["norm1"])(conv(block["conv1"], stride)(x)))
            y = norm(block["norm2"])(conv(block["conv2"])(y))
            if "shortcut" in block:
                x = norm(block["shortcut_norm"])(conv(block["shortcut"], stride)(x))
            x = keras.ops.relu(x + y)
    head = layer(keras.layers.Dense(10), w["head"]["kernel"], w["head"]["bias"])
    model = keras.Model(pictures, head(keras.layers.GlobalAveragePooling2D()(x)))
    for part, arrays in made:
        part.set_weights(arrays)
    return training(problem, model)
