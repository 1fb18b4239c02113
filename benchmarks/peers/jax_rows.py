"""What the JAX libraries' rows share: arrays on the device, and the parts that none of them has."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from problems import AdamW


def on_device(batches: list) -> list:
    return [jax.device_put(batch) for batch in batches]


def optimizer(adamw: AdamW) -> optax.GradientTransformation:
    return optax.adamw(**adamw._asdict())


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def rotate(x: jax.Array) -> jax.Array:
    """Give the heads of x [B, T, H, D] their rotary positions, halves paired."""
    T, D = x.shape[1], x.shape[3]
    angles = jnp.arange(T)[:, None] * 10000.0 ** (-jnp.arange(0, D, 2) / D)
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    low, high = x[..., : D // 2], x[..., D // 2 :]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1)


def layers(problem: Any) -> list[Any]:
    """Cut the stacked layers apart."""
    return [
        jax.tree.map(lambda x, i=i: x[i], problem.weights["layers"])
        for i in range(problem.config["layers"])
    ]
