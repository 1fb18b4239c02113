"""Run a model's layers one after the other, whether their parameters lie stacked or apart."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnml.core import Param

PyTree = Any
Layer = Callable[[PyTree, tuple[PyTree, PyTree]], tuple[PyTree, PyTree]]


def run_layers(
    layer: Layer, x: PyTree, params: PyTree, others: PyTree, *, unroll: int
) -> tuple[PyTree, PyTree]:
    """Return ``layer(x, (params, others))`` of the last layer, and all layers' second results, stacked.

    ``params`` lie stacked along a leading axis, or apart in a list; ``others`` and the second results
    are stacked.
    """
    if not isinstance(params, list):
        return lax.scan(layer, x, (params, others), unroll=unroll)
    layer = jax.jit(layer)  # traced and differentiated once, not once for each layer
    results = []
    for i, part in enumerate(params):
        x, result = layer(x, (part, jax.tree.map(lambda stack, i=i: stack[i], others)))
        results.append(result)
    return x, jax.tree.map(lambda *each: jnp.stack(each), *results)


def apart(layers: PyTree) -> list[PyTree]:
    """Return a spec of stacked layers as a list of one for each layer."""
    count = jax.tree.leaves(layers, is_leaf=lambda x: isinstance(x, Param))[0].shape[0]
    return [jax.tree.map(lambda p: Param(p.shape[1:], p.axes[1:], p.init), layers)] * count
