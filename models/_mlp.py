"""A multi-layer perceptron."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fnml.core import Model, Param, ShapeError, fold_name
from fnml.models._config import at_least, one_of, rate, refuse
from fnml.models._dropout import dropout
from fnml.models._gelu import gelu
from fnml.models._linear import linear
from fnml.models._wide import wide

PyTree = Any
_ACTIVATIONS = {"gelu": gelu, "relu": jax.nn.relu, "silu": jax.nn.silu, "tanh": jnp.tanh}


@dataclass(frozen=True)
class MLPConfig:
    """Describe a multi-layer perceptron.

    Raises:
      ConfigError: a field is out of range; every such field is named.

    >>> MLPConfig(inputs=64, hidden=(32,), outputs=10).activation
    'gelu'
    """

    inputs: int
    """The size of one flattened input."""
    outputs: int
    """The number of logits, V."""
    hidden: tuple[int, ...] = (256, 256)
    """The width of each hidden layer; ``()`` for a linear model."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    """What follows each hidden layer."""
    dropout: float = 0.0
    """The share of each hidden layer's outputs that is dropped in training."""

    def __post_init__(self) -> None:
        faults = at_least(self, 1, "inputs", "outputs", "hidden")
        faults += one_of(self, "activation", tuple(_ACTIVATIONS)) + rate(self, "dropout")
        refuse(self, faults)


def _dense(inputs: int, outputs: int, axes: tuple[str, str], gain: float) -> dict[str, Param]:
    normal = jax.nn.initializers.normal(math.sqrt(gain / inputs))
    return {
        "kernel": Param((inputs, outputs), axes, normal),
        "bias": Param((outputs,), axes[1:], jax.nn.initializers.zeros),
    }


def mlp(config: MLPConfig) -> Model:
    """Build a perceptron: ``apply(params, x, *, key=None) -> logits``.

    ``x`` [B, ...] is flattened to [B, inputs]; logits are [B, V] in the dtype of ``x`` and at
    least float32. Dropout happens only with a ``key``. Weights are drawn with variance 2 / D
    (He et al. 2015, arXiv:1502.01852), 1 / D in the head. Hidden axes are named ``"mlp"`` and
    ``"embed"`` by turns, so a rule on ``"mlp"`` shards pairs of layers by column, then by row.

    Raises:
      ShapeError: ``x`` does not flatten to ``inputs``.

    >>> import jax, jax.numpy as jnp
    >>> from fnml.core import init
    >>> model = mlp(MLPConfig(inputs=64, hidden=(32,), outputs=10))
    >>> model.apply(init(model.spec, jax.random.key(0)), jnp.ones((5, 8, 8))).shape
    (5, 10)
    """
    widths = (config.inputs, *config.hidden)
    names = [("embed", "mlp")[i % 2] for i in range(len(widths))]
    spec = {
        "hidden": [
            _dense(widths[i], widths[i + 1], (names[i], names[i + 1]), 2.0)
            for i in range(len(config.hidden))
        ],
        "head": _dense(widths[-1], config.outputs, (names[-1], "vocab"), 1.0),
    }
    activation = _ACTIVATIONS[config.activation]

    def apply(params: PyTree, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        if math.prod(x.shape[1:]) != config.inputs:
            raise ShapeError(
                f"the perceptron got x {x.shape}: expected [B, ...] that flattens to "
                f"[B, {config.inputs}]"
            )
        x = x.reshape(x.shape[0], config.inputs)
        for i, layer in enumerate(params["hidden"]):
            x = activation(linear(x, layer["kernel"], layer["bias"]))
            layer_key = None if key is None else fold_name(key, f"hidden/{i}")
            x = dropout(x, config.dropout, layer_key)
        sums = wide(x.dtype)
        return linear(x, params["head"]["kernel"], params["head"]["bias"], out_dtype=sums)

    return Model(spec, apply)
