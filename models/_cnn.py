"""A residual convolutional network with batch normalisation."""

from dataclasses import dataclass
from typing import Literal

from fnml.core import Model
from fnml.models._config import at_least, one_of, rate, refuse
from fnml.models._residual import residual

_FORMS = ("auto", "im2col", "shifted", "xla")


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
    form: Literal["auto", "im2col", "shifted", "xla"] = "auto"
    """How convolutions are computed (see :func:`fnml.models.conv2d`)."""

    def __post_init__(self) -> None:
        faults = at_least(self, 1, "classes", "channels", "widths", "blocks", "pool")
        if not self.widths:
            faults.append("widths=(): expected at least one stage")
        refuse(self, faults + rate(self, "dropout") + one_of(self, "form", _FORMS))


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
    return residual(
        "convolutional network",
        classes=config.classes,
        channels=config.channels,
        widths=config.widths,
        blocks=(config.blocks,) * len(config.widths),
        pool=config.pool,
        rate=config.dropout,
        form=config.form,
    )
