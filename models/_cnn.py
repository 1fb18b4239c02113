"""A residual convolutional network with batch normalisation."""

import math
from dataclasses import dataclass
from typing import Any

import jax

from fnml.core import Model, Param, ShapeError
from fnml.models._avg_pool2d import global_mean
from fnml.models._batch_norm import batch_norm, batch_norm_state
from fnml.models._config import at_least, rate, refuse
from fnml.models._conv2d import conv2d
from fnml.models._dropout import dropout
from fnml.models._linear import linear
from fnml.models._max_pool2d import max_pool2d
from fnml.models._wide import wide

PyTree = Any


@dataclass(frozen=True)
class CNNConfig:
    """Describe a residual network of basic blocks.

    Raises:
      ConfigError: a field is out of range; every such field is named.

    >>> CNNConfig(classes=10, widths=(16, 32)).blocks
    1
    """

    classes: int
    """The number of logits, V."""
    channels: int = 1
    """The channels of an image."""
    widths: tuple[int, ...] = (32, 64)
    """The channels of each stage; every stage but the first halves height and width."""
    blocks: int = 1
    """The residual blocks in each stage, two convolutions each."""
    pool: int = 1
    """The window of the max pooling after the stem; 1 for none."""
    dropout: float = 0.0
    """The share of the head's inputs that is dropped in training."""

    def __post_init__(self) -> None:
        faults = at_least(self, 1, "classes", "channels", "widths", "blocks", "pool")
        if not self.widths:
            faults.append("widths=(): expected at least one stage")
        refuse(self, faults + rate(self, "dropout"))


def _conv(size: int, inputs: int, outputs: int) -> Param:
    axes = (None, None, "conv_in", "conv_out")
    # He et al. 2015: variance 2 / fan-in keeps the scale through a ReLU.
    normal = jax.nn.initializers.normal(math.sqrt(2 / (size * size * inputs)))
    return Param((size, size, inputs, outputs), axes, normal)


def _norm(channels: int) -> dict[str, Param]:
    return {
        "scale": Param((channels,), ("conv_out",), jax.nn.initializers.ones),
        "bias": Param((channels,), ("conv_out",), jax.nn.initializers.zeros),
    }


def _block(inputs: int, outputs: int, stride: int) -> tuple[PyTree, PyTree]:
    """Describe one residual block: its parameters, and the state of its norms."""
    spec: PyTree = {
        "conv1": _conv(3, inputs, outputs),
        "norm1": _norm(outputs),
        "conv2": _conv(3, outputs, outputs),
        "norm2": _norm(outputs),
    }
    state = {"norm1": batch_norm_state(outputs), "norm2": batch_norm_state(outputs)}
    if stride > 1 or inputs != outputs:
        spec |= {"shortcut": _conv(1, inputs, outputs), "shortcut_norm": _norm(outputs)}
        state |= {"shortcut_norm": batch_norm_state(outputs)}
    return spec, state


def _apply_norm(x: jax.Array, params: PyTree, state: PyTree, train: bool) -> Any:
    return batch_norm(x, params["scale"], params["bias"], state=state, train=train)


def _apply_block(
    p: PyTree, x: jax.Array, s: PyTree, stride: int, train: bool
) -> tuple[jax.Array, PyTree]:
    stats = {}
    y = conv2d(x, p["conv1"], stride=stride)
    y, stats["norm1"] = _apply_norm(y, p["norm1"], s["norm1"], train)
    y = conv2d(jax.nn.relu(y), p["conv2"])
    y, stats["norm2"] = _apply_norm(y, p["norm2"], s["norm2"], train)
    if "shortcut" in p:
        x = conv2d(x, p["shortcut"], stride=stride)
        x, stats["shortcut_norm"] = _apply_norm(x, p["shortcut_norm"], s["shortcut_norm"], train)
    return jax.nn.relu(x + y), stats


def cnn(config: CNNConfig) -> Model:
    """Build a residual network: ``apply(params, x, *, state, train, key=None) -> (logits, stats)``.

    ``x`` is [B, H, W, C] of any height and width; logits are [B, V], at least float32. Each
    batch normalisation keeps ``"mean"`` and ``"square"`` in the state (see
    :func:`fnml.models.batch_norm`). With ``train`` it uses the statistics of ``x`` itself and
    ``stats`` has the state's structure with :class:`fnml.Mean` leaves, so a trainer folds
    ``momentum * old + (1 - momentum) * stats.value`` leaf by leaf. Otherwise it reads ``state``,
    ``stats`` is ``()``, and each example's logits depend on that example alone. Dropout happens
    only with a ``key``.

    Source: He et al. 2016, arXiv:1512.03385, section 4.2 (the network for small images, with
    projection shortcuts).

    Raises:
      ShapeError: ``x`` is not [B, H, W, C].

    >>> import jax, jax.numpy as jnp
    >>> from fnml.core import init
    >>> model = cnn(CNNConfig(classes=10, widths=(4, 8)))
    >>> params, state = (init(tree, jax.random.key(0)) for tree in (model.spec, model.state))
    >>> logits, stats = model.apply(params, jnp.ones((2, 8, 8, 1)), state=state, train=True)
    >>> logits.shape, jax.tree.structure(state) == jax.tree.structure(
    ...     jax.tree.map(lambda mean: mean.value, stats, is_leaf=lambda s: hasattr(s, "weight"))
    ... )
    ((2, 10), True)
    """
    stages, state_stages, inputs = [], [], config.widths[0]
    for i, width in enumerate(config.widths):
        strides = [2 if i and not j else 1 for j in range(config.blocks)]
        blocks = [_block(inputs if not j else width, width, s) for j, s in enumerate(strides)]
        stages.append([spec for spec, _ in blocks])
        state_stages.append([state for _, state in blocks])
        inputs = width
    normal = jax.nn.initializers.normal(math.sqrt(1 / inputs))
    spec = {
        "stem": {
            "conv": _conv(3, config.channels, config.widths[0]),
            "norm": _norm(config.widths[0]),
        },
        "stages": stages,
        "head": {
            "kernel": Param((inputs, config.classes), ("conv_out", "vocab"), normal),
            "bias": Param((config.classes,), ("vocab",), jax.nn.initializers.zeros),
        },
    }
    model_state = {"stem": {"norm": batch_norm_state(config.widths[0])}, "stages": state_stages}

    def apply(
        params: PyTree,
        x: jax.Array,
        *,
        state: PyTree,
        train: bool,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, PyTree]:
        if x.ndim != 4 or x.shape[3] != config.channels:
            raise ShapeError(
                f"the convolutional network got x {x.shape}: expected [B, H, W, {config.channels}]"
            )
        stem = params["stem"]
        x, stem_stats = _apply_norm(
            conv2d(x, stem["conv"]), stem["norm"], state["stem"]["norm"], train
        )
        x = jax.nn.relu(x)
        if config.pool > 1:
            x = max_pool2d(x, config.pool)
        stats: PyTree = {"stem": {"norm": stem_stats}, "stages": []}
        for i, (stage, stage_state) in enumerate(
            zip(params["stages"], state["stages"], strict=True)
        ):
            stats["stages"].append([])
            for j, (block, block_state) in enumerate(zip(stage, stage_state, strict=True)):
                x, block_stats = _apply_block(block, x, block_state, 2 if i and not j else 1, train)
                stats["stages"][-1].append(block_stats)
        x = dropout(global_mean(x), config.dropout, key)
        sums = wide(x.dtype)
        logits = linear(x, params["head"]["kernel"], params["head"]["bias"], out_dtype=sums)
        return logits, stats if train else ()

    return Model(spec, apply, model_state)
