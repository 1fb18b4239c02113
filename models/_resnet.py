"""ResNet-18 and its kin, for small images."""

from dataclasses import dataclass
from typing import Literal

from fnml.core import Model
from fnml.models._config import at_least, one_of, rate, refuse
from fnml.models._residual import residual

_FORMS = ("auto", "im2col", "shifted", "xla")


@dataclass(frozen=True)
class ResNetConfig:
    """Describe a ResNet of basic blocks; the defaults are ResNet-18 for images of 32 x 32.

    ``blocks=(3, 4, 6, 3)`` is ResNet-34.

    Raises:
      ConfigError: a field is out of range; every such field is named.

    >>> len(ResNetConfig(classes=10).widths)
    4
    """

    classes: int
    """The number of logits, V."""
    channels: int = 3
    """The channels of an image."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """The channels of each stage; every stage but the first halves height and width."""
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    """The residual blocks of each stage, two convolutions each."""
    pool: int = 1
    """The window of the max pooling after the stem, for larger images; 1 for none."""
    dropout: float = 0.0
    """The share of the head's inputs that is dropped in training."""
    form: Literal["auto", "im2col", "shifted", "xla"] = "auto"
    """How convolutions are computed (see :func:`fnml.models.conv2d`)."""

    def __post_init__(self) -> None:
        faults = at_least(self, 1, "classes", "channels", "widths", "blocks", "pool")
        if not self.widths:
            faults.append("widths=(): expected at least one stage")
        if len(self.widths) != len(self.blocks):
            faults.append(
                f"blocks={self.blocks}: expected one number for each of the {len(self.widths)} "
                f"stages in widths={self.widths}"
            )
        refuse(self, faults + rate(self, "dropout") + one_of(self, "form", _FORMS))


def resnet(config: ResNetConfig) -> Model:
    """Build a ResNet: ``apply(params, x, *, state, train, key=None) -> (logits, stats)``.

    ``x`` is [B, H, W, C] of any height and width, logits are [B, V], at least float32. The stem is
    one 3 x 3 convolution; each block is convolution, norm, ReLU, convolution, norm, then the sum
    with its input (through a 1 x 1 convolution and a norm where the shapes differ) and a ReLU.
    State, statistics and dropout are those of :func:`fnml.models.cnn`.

    Source: He et al. 2016, arXiv:1512.03385, table 1, with the stem of section 4.2.

    Raises:
      ShapeError: ``x`` is not [B, H, W, C].

    >>> import jax, jax.numpy as jnp
    >>> from fnml.core import count, init
    >>> count(resnet(ResNetConfig(classes=10)).spec)
    11173962
    >>> model = resnet(ResNetConfig(classes=10, widths=(4, 8), blocks=(1, 1)))
    >>> params, state = (init(tree, jax.random.key(0)) for tree in (model.spec, model.state))
    >>> model.apply(params, jnp.ones((2, 8, 8, 3)), state=state, train=False)[0].shape
    (2, 10)
    """
    return residual(
        "residual network",
        classes=config.classes,
        channels=config.channels,
        widths=config.widths,
        blocks=config.blocks,
        pool=config.pool,
        rate=config.dropout,
        form=config.form,
    )
