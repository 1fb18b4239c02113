"""The models that every law is tested on, and how results are compared."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from fnml import from_linen, from_nnx
from fnml.core import Mean, Metrics, Model, init, shard_key
from fnml.models import (
    CNNConfig,
    EncoderConfig,
    GPTConfig,
    MLPConfig,
    ResNetConfig,
    cnn,
    encoder,
    gpt,
    mlp,
    resnet,
)
from fnml.train import accuracy, cross_entropy, next_token

PyTree = Any
B, STEPS = 8, 3
KEY = jax.random.key(5)
# Float32 sums of a few thousand terms in another order: some ulps of 1.2e-7, relative in norm.
ROUNDING = 3e-6
# A bfloat16 activation is rounded by up to 2**-9, or not at all where XLA keeps it inside of a
# fusion: two programs for one loss differ by a few such roundings, relative in norm.
COARSE = 2e-2


@dataclass(frozen=True, eq=False)
class Case:
    """A small real model with its loss and data.

    Attributes:
      loss_fn: ``loss_fn(params, batch, key, **options) -> (loss, metrics)``.
      batches: host arrays ``[STEPS, B, ...]``.
      options: what the loss reads by keyword: the state of a stateful model.
      whole: whether the loss of a batch is the weighted mean over its parts: no random draws,
        no statistics of the batch.
      rounding: how far apart two programs for this loss may be, relative in norm.
    """

    loss_fn: Callable[..., tuple[jax.Array, Metrics]]
    params: PyTree
    model_state: PyTree
    batches: PyTree
    whole: bool
    rounding: float = ROUNDING

    @property
    def options(self) -> dict[str, PyTree]:
        return {"state": self.model_state} if self.model_state else {}

    @property
    def grad_fn(self) -> Callable[..., Any]:
        return jax.value_and_grad(self.loss_fn, has_aux=True)

    @property
    def batch(self) -> PyTree:
        return jax.tree.map(lambda x: x[0], self.batches)

    @functools.cached_property
    def at(self) -> Callable[..., PyTree]:
        """``((loss, metrics), grads)`` of ``grad_fn`` at any parameters, on any batch, compiled."""
        compiled = jax.jit(self.grad_fn)
        return lambda params, batch, key=KEY: compiled(params, batch, key, **self.options)

    def grads(self, grad_fn: Callable[..., Any], **options: Any) -> PyTree:
        """Return ``((loss, metrics), grads)`` on the first batch, compiled."""
        return jax.jit(grad_fn)(self.params, self.batch, KEY, **self.options, **options)

    def parts(self, count: int) -> list[PyTree]:
        """Return what ``grad_fn`` makes of each of ``count`` shards, alone, on the host."""
        parts = []
        for i in range(count):
            cut = slice(i * B // count, (i + 1) * B // count)
            shard = jax.tree.map(lambda x, cut=cut: x[cut], self.batch)
            parts.append(jax.device_get(self.at(self.params, shard, shard_key(KEY, i))))
        return parts

    def shards(self, count: int) -> PyTree:
        """Return the weighted mean of ``grad_fn`` over shards, written out in NumPy float64."""
        parts = self.parts(count)
        metrics = jax.tree.map(lambda *xs: np.sum(np.float64(xs), 0), *[m for (_, m), _ in parts])
        weights = [np.float64(m.weight) for (_, m), _ in parts]

        def mean(*xs: Any) -> np.ndarray:
            weighted = [m * np.float64(x) for m, x in zip(weights, xs, strict=True)]
            return np.sum(weighted, 0) / metrics.weight

        loss = mean(*[loss for (loss, _), _ in parts])
        return (loss, metrics), jax.tree.map(mean, *[grads for _, grads in parts])


def _images(
    model: Model, *, keyed: bool = False, whole: bool = False, dtype: Any = jnp.float32
) -> Case:
    """Classify tiny images, with float32 parameters and everything before the loss in ``dtype``."""
    rng = np.random.default_rng(0)
    batches = {
        "x": rng.normal(size=(STEPS, B, 4, 4, 2)).astype(np.float32),
        "y": rng.integers(0, 5, (STEPS, B)).astype(np.int32),
        # The third quarter of every batch does not count.
        "weights": (np.arange(B) // 2 != 2) * rng.uniform(0.5, 2.0, (STEPS, B)).astype(np.float32),
    }

    def loss_fn(params, batch, key, *, state=None):
        options = {"state": state, "train": key is not None} if model.state else {}
        options |= {"key": key} if keyed else {}
        narrow = jax.tree.map(lambda p: p.astype(dtype), params)
        out = model.apply(narrow, batch["x"].astype(dtype), **options)
        logits, stats = out if model.state else (out, ())
        loss = cross_entropy(logits, batch["y"], weights=batch["weights"])
        right = accuracy(logits, batch["y"], weights=batch["weights"])
        return loss.value, Metrics(loss.weight, {"accuracy": right}, stats)

    params, state = (init(tree, jax.random.key(0)) for tree in (model.spec, model.state))
    rounding = ROUNDING if dtype == jnp.float32 else COARSE
    return Case(loss_fn, params, state, batches, whole, rounding)


def _text(rate: float, width: int = 16, T: int = 6) -> Case:
    model = gpt(GPTConfig(vocab=11, width=width, layers=2, heads=2, context=T, dropout=rate))
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, T + 1, (STEPS, B, 1))
    lengths[:, :2] = 0  # the first quarter of every batch is masked entirely
    lengths[:, 2] = T
    batches = {
        "tokens": rng.integers(0, 11, (STEPS, B, T + 1)).astype(np.int32),
        "mask": (np.arange(T) < lengths).astype(np.float32),
    }

    def loss_fn(params, batch, key):
        tokens = batch["tokens"]
        logits = model.apply(params, tokens[:, :-1], key=key if rate else None)
        loss = next_token(logits, tokens[:, 1:], mask=batch["mask"])
        return loss.value, Metrics(loss.weight, {"longest": Mean.of(jnp.max(logits, -1))})

    return Case(loss_fn, init(model.spec, jax.random.key(0)), (), batches, rate == 0)


def _hidden_words() -> Case:
    """Guess the tokens of sequences of unequal lengths that were replaced by token 0."""
    model = encoder(
        EncoderConfig(
            vocab=11, width=8, layers=2, heads=2, context=6, types=2, dropout=0.2, unroll=1
        )
    )
    rng = np.random.default_rng(2)
    tokens = rng.integers(1, 11, (STEPS, B, 6)).astype(np.int32)
    lengths = rng.integers(1, 7, (STEPS, B)).astype(np.int32)
    lengths[:, :2] = 2
    hidden = rng.random((STEPS, B, 6)) < 0.5
    hidden[:, :2] = False  # nothing is asked of the first quarter of every batch
    hidden[:, 2, 0] = True
    batches = {
        "tokens": np.where(hidden, 0, tokens),
        "types": rng.integers(0, 2, (STEPS, B, 6)).astype(np.int32),
        "lengths": lengths,
        "targets": tokens,
        "asked": (hidden & (np.arange(6) < lengths[..., None])).astype(np.float32),
    }

    def loss_fn(params, batch, key):
        x = model.apply(params, batch["tokens"], batch["types"], lengths=batch["lengths"], key=key)
        logits = x @ params["embed"]["token"].astype(x.dtype).T
        loss = cross_entropy(logits, batch["targets"], weights=batch["asked"])
        right = accuracy(logits, batch["targets"], weights=batch["asked"])
        return loss.value, Metrics(loss.weight, {"accuracy": right})

    return Case(loss_fn, init(model.spec, jax.random.key(0)), (), batches, False)


class Convolution(linen.Module):
    """A guest that keeps state."""

    @linen.compact
    def __call__(self, x, train):
        x = linen.BatchNorm(use_running_average=not train)(linen.Conv(4, (3, 3))(x))
        return linen.Dense(5)(jnp.mean(linen.relu(x), (1, 2)))


class Perceptron(nnx.Module):
    """A guest that draws random numbers."""

    def __init__(self, *, rngs):
        self.first = nnx.Linear(32, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.last = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x.reshape(len(x), -1))))
        return self.last(self.drop(x))


def wide_text() -> Case:
    """Return the smallest language model whose products and attention C++ takes too."""
    return _text(0.2, width=64, T=16)


def cases() -> dict[str, Case]:
    """Return the models by name."""
    network = cnn(CNNConfig(classes=5, channels=2, widths=(4,)))
    return {
        "mlp": _images(mlp(MLPConfig(inputs=32, hidden=(16, 16), outputs=5)), whole=True),
        "cnn": _images(network),
        "cnn_in_bfloat16": _images(network, dtype=jnp.bfloat16),
        "resnet": _images(resnet(ResNetConfig(classes=5, channels=2, widths=(4,), blocks=(1,)))),
        "gpt": _text(0.2),
        "encoder": _hidden_words(),
        "gpt_without_dropout": _text(0.0),
        "linen": _images(from_linen(Convolution(), jnp.ones((1, 4, 4, 2)))[0]),
        "nnx": _images(from_nnx(Perceptron)[0], keyed=True),
    }


def distances(left: PyTree, right: PyTree) -> dict[str, float]:
    """Return how far two results are apart, in norms relative to ``right``.

    Gradients are one vector, and so are metrics: a leaf whose exact value is 0 (the gradient
    before a normalisation) has no relative error of its own.
    """
    (loss, metrics), grads = left
    (loss_r, metrics_r), grads_r = right

    def relative(a: PyTree, b: PyTree) -> float:
        assert jax.tree.map(np.shape, a) == jax.tree.map(np.shape, b)
        x, y = (np.concatenate([np.ravel(v) for v in jax.tree.leaves(t)]) for t in (a, b))
        x, y = x.astype(np.float64), y.astype(np.float64)
        return float(np.linalg.norm(x - y) / np.linalg.norm(y))

    return {
        "loss": relative(loss, loss_r),
        "metrics": relative(metrics, metrics_r),
        "grads": relative(grads, grads_r),
    }


def bits(tree: PyTree) -> list[bytes]:
    """Return every leaf's bytes."""

    def raw(x: Any) -> Any:
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return [np.asarray(raw(x)).tobytes() for x in jax.tree.leaves(tree)]
