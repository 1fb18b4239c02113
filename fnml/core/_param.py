"""The description of one array of a model, and what follows from a tree of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fnml.core._errors import ConfigError
from fnml.core._keys import fold_name
from fnml.core._paths import leaf_names, map_with_name

PyTree = Any
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


@dataclass(frozen=True)
class Param:
    """Describe one array: shape, dtype, logical axis names and how to draw it.

    A ``Param`` is a leaf, so a tree of them is mapped with :func:`jax.tree.map`.

    Args:
      shape: the array's shape.
      axes: a logical name or ``None`` for each dimension, such as ``("layers", "embed", "heads")``;
        sharding rules speak of these names.
      init: ``init(key, shape, dtype) -> array``, as in :mod:`jax.nn.initializers`.
      dtype: the dtype the parameter is kept in.

    Raises:
      ConfigError: ``shape`` and ``axes`` differ in length, or a size is not positive.

    >>> import jax
    >>> Param((2, 3), ("embed", "mlp"), jax.nn.initializers.zeros).size
    6
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ConfigError(
                f"a Param of shape {self.shape} has {len(self.shape)} dimensions, "
                f"but {len(self.axes)} axis names {self.axes}: name each one, or use None"
            )
        if any(size < 1 for size in self.shape):
            raise ConfigError(f"a Param has shape {self.shape}: every size has to be at least 1")

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.size * jnp.dtype(self.dtype).itemsize


def is_param(leaf: Any) -> bool:
    """Tell whether ``leaf`` is a :class:`Param`."""
    return isinstance(leaf, Param)


def abstract(spec: PyTree) -> PyTree:
    """Return the spec's arrays as :class:`jax.ShapeDtypeStruct`, for tracing and restoring.

    >>> import jax
    >>> abstract({"w": Param((2,), (None,), jax.nn.initializers.zeros)})
    {'w': ShapeDtypeStruct(shape=(2,), dtype=float32)}
    """
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), spec)


def count(spec: PyTree) -> int:
    """Count the parameters of a spec or of an array tree.

    >>> import jax
    >>> count({"w": Param((2, 3), (None, None), jax.nn.initializers.zeros)})
    6
    """
    return sum(leaf.size for leaf in jax.tree.leaves(spec))


def init(spec: PyTree, key: jax.Array, shardings: PyTree | None = None) -> PyTree:
    """Draw a model's parameters (or its initial state) in one compiled call.

    Each array's key is ``fold_name(key, path)``: adding, removing or reordering parameters
    changes no other parameter.

    Args:
      spec: a tree of :class:`Param`.
      key: a typed key, ``jax.random.key(seed)``.
      shardings: a tree like ``spec`` of shardings (see :func:`fnml.core.shardings`); each device
        then computes and holds only its part.

    Raises:
      ConfigError: ``spec`` has leaves that are no Param, or two leaves of one path; all listed.

    >>> import jax
    >>> spec = {"w": Param((2, 3), ("embed", "mlp"), jax.nn.initializers.lecun_normal())}
    >>> init(spec, jax.random.key(0))["w"].shape
    (2, 3)
    """

    if hasattr(spec, "spec") and hasattr(spec, "apply"):
        raise ConfigError("init takes a spec, got a Model: pass model.spec (or model.state)")
    names = leaf_names(spec)
    faults = [
        f"{name}: expected a Param in the spec, got {type(leaf).__name__}"
        for name, leaf in zip(names, jax.tree.leaves(spec), strict=True)
        if not is_param(leaf)
    ]
    faults += [
        f"{name}: two parameters have this path, and would be drawn alike"
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    if faults:
        raise ConfigError("\n".join(faults))

    def draw(key: jax.Array) -> PyTree:
        return map_with_name(lambda name, p: p.init(fold_name(key, name), p.shape, p.dtype), spec)

    return jax.jit(draw, out_shardings=shardings)(key)
