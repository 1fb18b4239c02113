"""Writing into a tensor at computed places: ScatterElements, ScatterND, TensorScatter."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax

from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._static import axis_of, traced

# A reduction's name, and the method of ``x.at[...]`` that does it.
_WRITES = {"none": "set", "add": "add", "mul": "multiply", "min": "min", "max": "max"}


def _write(node: Node, x: Any, places: tuple[Any, ...], updates: Any) -> Any:
    reduction = node.attributes.get("reduction", "none")
    return getattr(x.at[places], _WRITES[reduction])(updates)


def _scatter_elements(node: Node, x: Any, indices: Any, updates: Any) -> Any:
    x, indices, updates = traced(node, x, indices, updates)
    axis = axis_of(node, node.attributes.get("axis", 0), x.ndim)
    places = tuple(
        indices if a == axis else lax.broadcasted_iota(indices.dtype, indices.shape, a)
        for a in range(x.ndim)
    )
    return _write(node, x, places, updates)


def _scatter_nd(node: Node, x: Any, indices: Any, updates: Any) -> Any:
    x, indices, updates = traced(node, x, indices, updates)
    return _write(node, x, tuple(jnp.moveaxis(indices, -1, 0)), updates)


def _tensor_scatter(node: Node, cache: Any, update: Any, starts: Any = None) -> Any:
    cache, update, starts = traced(node, cache, update, starts)
    axis = axis_of(node, node.attributes.get("axis", -2), cache.ndim)
    if starts is None:
        starts = jnp.zeros(cache.shape[0], jnp.int32)
    places = [lax.broadcasted_iota(starts.dtype, update.shape, a) for a in range(cache.ndim)]
    places[axis] = places[axis] + starts.reshape([-1] + [1] * (cache.ndim - 1))
    if node.attributes.get("mode", "linear") == "circular":
        places[axis] = places[axis] % cache.shape[axis]
    return cache.at[tuple(places)].set(update)


OPERATORS: Mapping[str, Operator] = {
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "TensorScatter": _tensor_scatter,
}
