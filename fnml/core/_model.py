"""A model: what its parameters are, and the pure function of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

PyTree = Any


class Model(NamedTuple):
    """A description of parameters, and a pure function of them.

    Attributes:
      spec: a tree of :class:`fnml.Param`.
      apply: ``apply(params, *inputs, **options) -> outputs``. Random draws take an explicit
        ``key=``. A model with state is called ``apply(params, *inputs, state=..., train=...)``
        and returns ``(outputs, stats)``: ``stats`` has the structure of ``state`` with
        :class:`fnml.Mean` leaves, to be put into ``Metrics.stats`` when training.
      state: a tree of :class:`fnml.Param` for state that training updates without gradients
        (BatchNorm's moving averages); ``()`` for models without.

    Law: ``apply`` is pure: the same arguments give the same bits.

    >>> import jax, jax.numpy as jnp
    >>> from fnml.core import Param, init
    >>> zeros = jax.nn.initializers.zeros
    >>> line = Model({"w": Param((3,), ("embed",), zeros)}, lambda params, x: x @ params["w"])
    >>> line.apply(init(line.spec, jax.random.key(0)), jnp.ones((2, 3))).shape
    (2,)
    """

    spec: PyTree
    apply: Callable[..., Any]
    state: PyTree = ()
