"""The models that every model transform is tested on: hand-written, linen and nnx."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from fnml import from_linen, from_nnx
from fnml.core import Metrics, Model, init
from fnml.models import CNNConfig, GPTConfig, MLPConfig, cnn, gpt, mlp
from fnml.train import cross_entropy, next_token

PyTree = Any
KEY = jax.random.key(7)
QUICK = {"xla_llvm_disable_expensive_passes": True}


@dataclass(frozen=True, eq=False)
class Case:
    """A small model with parameters, state, a batch, and how it is called."""

    model: Model
    params: PyTree
    state: PyTree
    batch: dict[str, jax.Array]
    text: bool = False

    @property
    def options(self) -> dict[str, PyTree]:
        return {"state": self.state} if self.state else {}

    def call(self, model: Model, params: PyTree, key: Any = None, **options: Any) -> PyTree:
        """Run ``model`` compiled, in training where there is a key."""
        own = {**self.options, **options}
        run = compiled(model.apply, (key is not None) if self.state else None)
        return run(params, self.batch["x"], key, own)

    def loss_fn(self, model: Model) -> Any:
        def loss_fn(params, batch, key, **options):
            own = {**options, "train": key is not None} if options else {}
            out = model.apply(params, batch["x"], key=key, **own)
            logits, stats = out if options else (out, ())
            loss = (next_token if self.text else cross_entropy)(logits, batch["y"])
            return loss.value, Metrics(loss.weight, {}, stats)

        return loss_fn


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
        x = nn.DenseGeneral((2, 6))(x.mean((1, 2)))
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(32, 12, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.hidden(x.reshape(x.shape[0], -1)))))


@functools.cache
def compiled(apply: Any, train: bool | None) -> Any:
    """Compile ``apply`` once for all tests, with the passes left out that take the time."""
    told = {} if train is None else {"train": train}
    return jax.jit(
        lambda p, x, key, options: apply(p, x, key=key, **options, **told),
        compiler_options=QUICK,
    )


@functools.cache
def case(name: str) -> Case:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 4, 4, 2)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 5, 8), jnp.int32)
    if name == "linen":
        model, params = from_linen(Linen(), x[:1], rngs=("dropout",))
    elif name == "nnx":
        model, params = from_nnx(Nnx)
    else:
        model = {
            "mlp": mlp(MLPConfig(inputs=32, hidden=(16,), outputs=5, dropout=0.2)),
            "cnn": cnn(CNNConfig(classes=5, channels=2, widths=(4,), blocks=1)),
            "gpt": gpt(
                GPTConfig(vocab=11, width=16, layers=2, heads=2, context=6, dropout=0.2, unroll=1)
            ),
        }[name]
        params = init(model.spec, jax.random.key(0))
    state = init(model.state, KEY)
    if name != "gpt":
        return Case(model, params, state, {"x": x, "y": y})
    tokens = jnp.asarray(rng.integers(0, 11, (8, 7)), jnp.int32)
    return Case(model, params, state, {"x": tokens[:, :-1], "y": tokens[:, 1:]}, text=True)


NAMES = ("mlp", "cnn", "gpt", "linen", "nnx")


def same_bits(left: PyTree, right: PyTree) -> None:
    """Assert that two trees are equal in structure, dtypes and bytes."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def distance(left: PyTree, right: PyTree) -> float:
    """Return the distance of two trees in norms of the right one."""
    assert jax.tree.map(jnp.shape, left) == jax.tree.map(jnp.shape, right)
    x, y = (
        np.concatenate([np.ravel(np.float64(v)) for v in jax.tree.leaves(t)]) for t in (left, right)
    )
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))
