"""The models that every law is tested on, and how results are compared."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnml.core import Mean, Metrics, Model, init, shard_key
from fnml.models import CNNConfig, GPTConfig, MLPConfig, cnn, gpt, mlp
from fnml.train import accuracy, cross_entropy, next_token

PyTree = Any
B, STEPS = 8, 3


@dataclass(frozen=True, eq=False)
class Case:
    """A small real model with its loss and data.

    Attributes:
      loss_fn: ``loss_fn(params, batch, key, **options) -> (loss, metrics)``.
      batches: host arrays ``[STEPS, B, ...]``.
      options: what the loss reads by keyword: the state of a stateful model.
      whole: whether the loss of a batch is the weighted mean over its parts: no random draws,
        no statistics of the batch.
    """

    loss_fn: Callable[..., tuple[jax.Array, Metrics]]
    params: PyTree
    model_state: PyTree
    batches: PyTree
    whole: bool

    @property
    def options(self) -> dict[str, PyTree]:
        return {"state": self.model_state} if self.model_state else {}

    @property
    def grad_fn(self) -> Callable[..., Any]:
        return jax.value_and_grad(self.loss_fn, has_aux=True)

    @property
    def batch(self) -> PyTree:
        return jax.tree.map(lambda x: x[0], self.batches)

    def grads(self, grad_fn: Callable[..., Any]) -> PyTree:
        """Return ``((loss, metrics), grads)`` on the first batch, compiled."""
        return jax.jit(grad_fn)(self.params, self.batch, jax.random.key(5), **self.options)

    def shards(self, count: int) -> PyTree:
        """Return the weighted mean of ``grad_fn`` over shards, written out in NumPy float64."""
        compiled, parts = jax.jit(self.grad_fn), []
        for i in range(count):
            cut = slice(i * B // count, (i + 1) * B // count)
            shard = jax.tree.map(lambda x, cut=cut: x[cut], self.batch)
            key = shard_key(jax.random.key(5), i)
            parts.append(jax.device_get(compiled(self.params, shard, key, **self.options)))
        metrics = jax.tree.map(lambda *xs: np.sum(np.float64(xs), 0), *[m for (_, m), _ in parts])
        weights = [np.float64(m.weight) for (_, m), _ in parts]

        def mean(*xs: Any) -> np.ndarray:
            weighted = [m * np.float64(x) for m, x in zip(weights, xs, strict=True)]
            return np.sum(weighted, 0) / metrics.weight

        loss = mean(*[loss for (loss, _), _ in parts])
        return (loss, metrics), jax.tree.map(mean, *[grads for _, grads in parts])


def _images(model: Model, stateful: bool, whole: bool) -> Case:
    rng = np.random.default_rng(0)
    batches = {
        "x": rng.normal(size=(STEPS, B, 4, 4, 2)).astype(np.float32),
        "y": rng.integers(0, 5, (STEPS, B)).astype(np.int32),
        # The third quarter of every batch does not count.
        "weights": (np.arange(B) // 2 != 2) * rng.uniform(0.5, 2.0, (STEPS, B)).astype(np.float32),
    }

    def loss_fn(params, batch, key, *, state=None):
        options = {"state": state, "train": key is not None} if stateful else {}
        out = model.apply(params, batch["x"], **options)
        logits, stats = out if stateful else (out, ())
        loss = cross_entropy(logits, batch["y"], weights=batch["weights"])
        right = accuracy(logits, batch["y"], weights=batch["weights"])
        return loss.value, Metrics(loss.weight, {"accuracy": right}, stats)

    params, state = (init(tree, jax.random.key(0)) for tree in (model.spec, model.state))
    return Case(loss_fn, params, state, batches, whole)


def _text(rate: float) -> Case:
    model = gpt(GPTConfig(vocab=11, width=16, layers=2, heads=2, context=6, dropout=rate))
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 7, (STEPS, B, 1))
    lengths[:, :2] = 0  # the first quarter of every batch is masked entirely
    lengths[:, 2] = 6
    batches = {
        "tokens": rng.integers(0, 11, (STEPS, B, 7)).astype(np.int32),
        "mask": (np.arange(6) < lengths).astype(np.float32),
    }

    def loss_fn(params, batch, key):
        tokens = batch["tokens"]
        logits = model.apply(params, tokens[:, :-1], key=key if rate else None)
        loss = next_token(logits, tokens[:, 1:], mask=batch["mask"])
        return loss.value, Metrics(loss.weight, {"longest": Mean.of(jnp.max(logits, -1))})

    return Case(loss_fn, init(model.spec, jax.random.key(0)), (), batches, rate == 0)


def cases() -> dict[str, Case]:
    """Return the models by name."""
    perceptron = mlp(MLPConfig(inputs=32, hidden=(16, 16), outputs=5))
    return {
        "mlp": _images(perceptron, stateful=False, whole=True),
        "cnn": _images(
            cnn(CNNConfig(classes=5, channels=2, widths=(4,))), stateful=True, whole=False
        ),
        "gpt": _text(0.2),
        "gpt_without_dropout": _text(0.0),
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
