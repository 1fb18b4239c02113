"""Values known at trace time (NumPy arrays) and values computed by JAX, side by side.

An operator is given NumPy arrays for what is known while tracing (constants, and what is computed
from them and from shapes) and JAX arrays for the rest. What gives a shape has to be known.
"""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from fnml.core import ShapeError
from fnml.interop.onnx._dtypes import canonical, is_float, narrow, widest
from fnml.interop.onnx._node import Node

# A file of a few bytes could otherwise ask for any amount of memory.
MOST_ELEMENTS = 2**28


def is_static(*values: Any) -> bool:
    """Tell whether all values are known at trace time; ``None`` and empty sequences are."""
    return all(
        is_static(*v) if isinstance(v, list) else v is None or isinstance(v, np.ndarray)
        for v in values
    )


def namespace(*values: Any) -> ModuleType:
    """Return numpy where all values are known at trace time, else jax.numpy."""
    return np if is_static(*values) else jnp


def where_is(node: Node) -> str:
    """Name a node for messages: ``node 'conv1' (Conv)``."""
    return f"node {node.name!r} ({node.op})"


def static(node: Node, which: int | str, value: Any) -> np.ndarray:
    """Return a value that has to be known at trace time.

    A JAX array that is no tracer, as when ``apply`` runs without ``jit``, is known too.

    Args:
      node: the node that takes the value.
      which: the input's place in ``node.inputs``, or what it is called.
      value: the input.

    Raises:
      ShapeError: the value is traced; the message names it and ``static_inputs``.
    """
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer):
        return np.asarray(value)
    given = which if isinstance(which, str) else f"input {which} ({node.inputs[which]!r})"
    raise ShapeError(
        f"{where_is(node)}: {given} decides a shape or a structure, and is known only when the "
        "model runs. Give the graph's input that it comes from as a constant: "
        "from_onnx(..., static_inputs={name: value}); or call apply without jit"
    )


def static_ints(node: Node, which: int | str, value: Any) -> tuple[int, ...]:
    """Return a value that has to be known at trace time as a tuple of ints, from any rank.

    Among them may be symbolic sizes, where the model is traced for export.
    """
    return tuple(_size(x) for x in np.ravel(static(node, which, value)))


def _size(size: Any) -> Any:
    return size if is_symbolic_dim(size) else int(size)


def size_array(values: Any) -> np.ndarray:
    """Return sizes as an array: int64, or of Python objects where one of them is symbolic."""
    found = np.asarray(values, object)
    return found if any(map(is_symbolic_dim, found.flat)) else found.astype(np.int64)


def is_symbolic(value: Any) -> bool:
    """Tell whether a value is an array of sizes of which one is symbolic."""
    objects = isinstance(value, np.ndarray) and value.dtype == object
    return objects and any(map(is_symbolic_dim, value.flat))


def put(array: np.ndarray) -> jax.Array:
    """Return an array as JAX's: copied, where ``jnp.asarray`` would compile one program a shape."""
    with jax.ensure_compile_time_eval():
        return jax.device_put(array)


def traced(node: Node, *values: Any) -> tuple[Any, ...]:
    """Return values as JAX arrays, in the dtypes JAX computes in; ``None`` stays.

    Raises:
      ShapeError: a known integer does not fit 32 bit while JAX runs without 64 bit, or a string.
    """

    def one(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        if is_symbolic(value):
            rows = [jnp.asarray(size) for size in value.flat]
            return jnp.stack(rows).astype(canonical(np.int64)).reshape(value.shape)
        if value.dtype == object:
            raise ShapeError(f"{where_is(node)}: strings have to be known at trace time")
        return put(narrow(value, where_is(node)))

    return tuple(one(v) for v in values)


def align(node: Node, *values: Any) -> tuple[Any, ...]:
    """Return values for an elementwise operator that broadcasts: of one rank, one float dtype.

    All stay NumPy where all are; else all become JAX arrays. Leading dimensions of 1 are added.
    Floats of several widths, which no valid model has but one whose parameters were cast, take
    the widest.
    """
    if not is_static(*values):
        values = traced(node, *values)
    rank = max((v.ndim for v in values if v is not None), default=0)
    floats = {v.dtype for v in values if v is not None and is_float(v.dtype)}
    wide = widest(*floats) if len(floats) > 1 else None

    def one(value: Any) -> Any:
        if value is None:
            return None
        if value.ndim < rank:
            value = value.reshape((1,) * (rank - value.ndim) + value.shape)
        return value.astype(wide) if wide is not None and is_float(value.dtype) else value

    return tuple(one(v) for v in values)


def axis_of(node: Node, axis: int, rank: int) -> int:
    """Return an axis as a number from 0, negative ones counted from the end.

    Raises:
      ShapeError: there is no such axis.
    """
    if not -rank <= axis < max(rank, 1):
        raise ShapeError(f"{where_is(node)}: axis {axis} of an array of rank {rank}")
    return axis % rank if rank else 0


def checked(node: Node, shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape that a model computed, if an array of it can be made.

    Raises:
      ShapeError: a size is negative, or there would be more than 2^28 elements.
    """
    shape = tuple(map(_size, shape))
    known = [size for size in shape if isinstance(size, int)]
    if any(size < 0 for size in known) or math.prod(known) > MOST_ELEMENTS:
        raise ShapeError(f"{where_is(node)}: would make an array of shape {list(shape)}")
    return shape
