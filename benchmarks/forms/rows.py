"""Four models, each in fnml's form and in a textbook's: the same parameters, batch and loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import textbook

from fnml import core, models, train
from fnml.core import Param

PyTree = Any


class Row(NamedTuple):
    """One program in two forms.

    Attributes:
      ours: fnml's form, a function of ``arguments``.
      textbook: the same in plain jnp and lax.
      spec: describes the parameters.
      batch: shapes of the batch.
      below: what the batch's integers are below.
      tolerance: how far apart the forms' results may be, relative to the norm of each array: as
        rounding leaves them.
    """

    ours: Callable[..., Any]
    textbook: Callable[..., Any]
    spec: PyTree
    batch: tuple[jax.ShapeDtypeStruct, ...]
    below: int
    tolerance: float = 1e-4


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def gpt(T: int, B: int, **sizes: Any) -> Row:
    """The loss and gradient of a GPT."""
    config = models.GPTConfig(context=T, **sizes)
    model = models.gpt(config)

    def ours(params: PyTree, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        return train.next_token(model.apply(params, tokens), targets).value

    def plain(params: PyTree, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        return textbook.cross_entropy(textbook.gpt(config, params, tokens), targets)

    gradients = map(jax.value_and_grad, (ours, plain))
    return Row(*gradients, model.spec, (_ints(B, T), _ints(B, T)), config.vocab)


def encoder(T: int, B: int, **sizes: Any) -> Row:
    """The forward pass of an encoder."""
    config = models.EncoderConfig(context=T, **sizes)
    model = models.encoder(config)

    def plain(params: PyTree, tokens: jax.Array) -> jax.Array:
        return textbook.encoder(config, params, tokens)

    return Row(model.apply, plain, model.spec, (_ints(B, T),), config.vocab)


def cnn(size: int, B: int, form: str = "auto") -> Row:
    """The loss and gradient of two convolutions with max pooling and two linear layers."""
    shapes = ((1, 32), (32, 64))
    init = jax.nn.initializers.normal(0.1)

    def layer(*shape: int) -> dict[str, Param]:
        kernel = Param(shape, (None,) * len(shape), init)
        return {"kernel": kernel, "bias": Param(shape[-1:], (None,), init)}

    inputs = (size // 4) ** 2 * 64
    spec = {
        "convolutions": [layer(3, 3, *pair) for pair in shapes],
        "layers": [layer(inputs, 128), layer(128, 10)],
    }

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        for p in params["convolutions"]:
            x = models.conv2d(x, p["kernel"], form=form) + p["bias"].reshape(1, 1, 1, -1)
            x = models.max_pool2d(jax.nn.relu(x))
        first, last = params["layers"]
        x = jax.nn.relu(models.linear(x.reshape(len(x), -1), **first))
        return models.linear(x, **last)

    def ours(params: PyTree, x: jax.Array, labels: jax.Array) -> jax.Array:
        return train.cross_entropy(apply(params, x), labels).value

    def plain(params: PyTree, x: jax.Array, labels: jax.Array) -> jax.Array:
        return textbook.cross_entropy(textbook.cnn(params, x), labels)

    batch = (_floats(B, size, size, 1), _ints(B))
    return Row(*map(jax.value_and_grad, (ours, plain)), spec, batch, 10)


def resnet(size: int, B: int, **sizes: Any) -> Row:
    """The loss, gradient and moments of a residual network."""
    model = models.resnet(models.ResNetConfig(classes=10, **sizes))
    # In training the norms take the batch's own moments.
    state = core.init(model.state, jax.random.key(0))

    def ours(params: PyTree, x: jax.Array, labels: jax.Array) -> Any:
        logits, stats = model.apply(params, x, state=state, train=True)
        moments = jax.tree.map(lambda m: m.value, stats, is_leaf=lambda m: isinstance(m, core.Mean))
        return train.cross_entropy(logits, labels).value, moments

    def plain(params: PyTree, x: jax.Array, labels: jax.Array) -> Any:
        logits, moments = textbook.resnet(params, x)
        return textbook.cross_entropy(logits, labels), moments

    def gradient(loss: Callable[..., Any]) -> Callable[..., Any]:
        return jax.value_and_grad(loss, has_aux=True)

    batch = (_floats(B, size, size, 3), _ints(B))
    return Row(*map(gradient, (ours, plain)), model.spec, batch, 10)


def full() -> dict[str, Row]:
    """Return the rows at the sizes that people train."""
    small = {"vocab": 256, "width": 256, "layers": 2, "heads": 4}
    long = {"vocab": 4096, "width": 512, "layers": 2, "heads": 8}
    bert = {"vocab": 30522, "width": 768, "layers": 2, "heads": 12}
    return {
        "GPT, width 256, T=256": gpt(256, 8, **small),
        "GPT, width 512, T=1,024": gpt(1024, 8, **long),
        "GPT, width 512, T=1,024, bfloat16": gpt(1024, 8, dtype="bfloat16", **long),
        "CNN, 28 x 28": cnn(28, 64),
        "ResNet-18, 32 x 32": resnet(32, 32),
        "encoder, width 768, T=128": encoder(128, 4, **bert),
    }


def small() -> dict[str, Row]:
    """Return the rows at sizes that compile in seconds, and one that is worse, to be found."""
    return {
        "gpt": gpt(128, 4, vocab=256, width=128, layers=1, heads=2),
        "cnn": cnn(16, 8),
        "resnet": resnet(16, 8, widths=(32, 64), blocks=(1, 1)),
        "encoder": encoder(128, 4, vocab=256, width=128, layers=1, heads=2),
        "planted": cnn(16, 8, form="im2col"),
    }
