"""Residual networks of basic blocks with batch normalisation, and what they are made of."""

import math
from typing import Any

import jax

from fnml.core import Model, Param, ShapeError
from fnml.models._avg_pool2d import global_mean
from fnml.models._batch_norm import batch_norm, batch_norm_state
from fnml.models._batch_norm_relu import batch_norm_relu
from fnml.models._conv2d import conv2d
from fnml.models._dropout import dropout
from fnml.models._formulation import ConvForm
from fnml.models._linear import linear
from fnml.models._max_pool2d import max_pool2d
from fnml.models._wide import wide

PyTree = Any


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


def _apply_block(
    p: PyTree, x: jax.Array, s: PyTree, stride: int, train: bool, form: ConvForm
) -> tuple[jax.Array, PyTree]:
    stats = {}
    y = conv2d(x, p["conv1"], stride=stride, form=form)
    y, stats["norm1"] = batch_norm_relu(y, **p["norm1"], state=s["norm1"], train=train)
    y = conv2d(y, p["conv2"], form=form)
    if "shortcut" in p:
        x = conv2d(x, p["shortcut"], stride=stride, form=form)
        norm = s["shortcut_norm"]
        x, stats["shortcut_norm"] = batch_norm(x, **p["shortcut_norm"], state=norm, train=train)
    y, stats["norm2"] = batch_norm_relu(y, **p["norm2"], state=s["norm2"], train=train, residual=x)
    return y, stats


def residual(
    name: str,
    *,
    classes: int,
    channels: int,
    widths: tuple[int, ...],
    blocks: tuple[int, ...],
    pool: int,
    rate: float,
    form: ConvForm,
) -> Model:
    """Build a stem, stages of ``blocks`` basic blocks, and a head over the mean of all positions.

    Every stage but the first halves height and width. ``pool`` is the window of the max pooling
    after the stem, ``rate`` the share of the head's inputs that is dropped in training, ``form`` that
    of every convolution.

    Raises:
      ShapeError: (``apply``) ``x`` is not [B, H, W, C]; ``name`` says in which network.
    """
    stages, state_stages, inputs = [], [], widths[0]
    for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        strides = [2 if i and not j else 1 for j in range(count)]
        stage = [_block(inputs if not j else width, width, s) for j, s in enumerate(strides)]
        stages.append([spec for spec, _ in stage])
        state_stages.append([state for _, state in stage])
        inputs = width
    normal = jax.nn.initializers.normal(math.sqrt(1 / inputs))
    spec = {
        "stem": {
            "conv": _conv(3, channels, widths[0]),
            "norm": _norm(widths[0]),
        },
        "stages": stages,
        "head": {
            "kernel": Param((inputs, classes), ("conv_out", "vocab"), normal),
            "bias": Param((classes,), ("vocab",), jax.nn.initializers.zeros),
        },
    }
    model_state = {"stem": {"norm": batch_norm_state(widths[0])}, "stages": state_stages}

    def apply(
        params: PyTree,
        x: jax.Array,
        *,
        state: PyTree,
        train: bool,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, PyTree]:
        if x.ndim != 4 or x.shape[3] != channels:
            raise ShapeError(f"the {name} got x {x.shape}: expected [B, H, W, {channels}]")
        stem = params["stem"]
        x = conv2d(x, stem["conv"], form=form)
        norm = state["stem"]["norm"]
        x, stem_stats = batch_norm_relu(x, **stem["norm"], state=norm, train=train)
        if pool > 1:
            x = max_pool2d(x, pool)
        stats: PyTree = {"stem": {"norm": stem_stats}, "stages": []}
        for i, (stage, stage_state) in enumerate(
            zip(params["stages"], state["stages"], strict=True)
        ):
            stats["stages"].append([])
            for j, (block, block_state) in enumerate(zip(stage, stage_state, strict=True)):
                stride = 2 if i and not j else 1
                x, block_stats = _apply_block(block, x, block_state, stride, train, form)
                stats["stages"][-1].append(block_stats)
        x = dropout(global_mean(x), rate, key)
        sums = wide(x.dtype)
        logits = linear(x, params["head"]["kernel"], params["head"]["bias"], out_dtype=sums)
        return logits, stats if train else ()

    return Model(spec, apply, model_state)
