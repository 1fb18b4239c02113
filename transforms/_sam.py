"""Sharpness-aware minimisation: the gradient at the worst point nearby."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fnml.core import ConfigError, Mean, Metrics
from fnml.transforms._layout import GradFn, refuse_laid

PyTree = Any


def sam(grad_fn: GradFn, rho: float = 0.05) -> GradFn:
    """Return the gradients at ``params + rho * g / |g|``, where ``g`` are those at ``params``.

    Descending along them prefers flat minima. It costs two gradients per step. Both use the same
    key, hence the same dropout mask. The loss, the metrics and the statistics are those at
    ``params``; the metric ``"sharpness"`` is how much the loss rises towards the other point.

    Inside a layout every shard climbs on its own, which is what the paper calls m-sharpness
    (section 4.1) and finds better than climbing with the whole batch.

    Law: ``sam(g, rho)(p, b, key)[1] == g(p + rho * n, b, key)[1]`` with ``n = g(p, b,
    key)[1]`` divided by its global norm, to rounding; where all gradients are 0 it is ``g`` itself.

    Source: Foret et al. 2021, arXiv:2010.01412, equation 2 and algorithm 1 (p = 2).

    Args:
      grad_fn: a gradient function of one shard, ``jax.value_and_grad(loss_fn, has_aux=True)``.
      rho: the radius of the neighbourhood.

    Raises:
      ConfigError: ``rho`` is not positive, or the loss has a metric ``"sharpness"`` (when called).
      LayoutError: ``grad_fn`` is laid out already; the message names the order that works.

    >>> import jax, jax.numpy as jnp
    >>> def loss_fn(params, batch, key):
    ...     return params**2 / 2, Metrics(jnp.float32(1.0))
    >>> sharp = sam(jax.value_and_grad(loss_fn, has_aux=True), 0.5)
    >>> float(sharp(jnp.float32(2.0), None, None)[1])
    2.5
    """
    if not rho > 0:
        raise ConfigError(f"sam's radius rho has to be positive, got {rho}")
    refuse_laid(grad_fn, "sam")

    def sharp(
        params: PyTree, batch: PyTree, key: jax.Array | None, **options: Any
    ) -> tuple[tuple[jax.Array, Metrics], PyTree]:
        (loss, metrics), grads = grad_fn(params, batch, key, **options)
        if "sharpness" in metrics.values:
            raise ConfigError(
                "a loss's metrics cannot be named 'sharpness', the name under which sam reports: "
                "rename it, or apply sam once"
            )
        norm = jnp.sqrt(square_norm(grads))
        share = rho / jnp.where(norm == 0, jnp.ones_like(norm), norm)

        def climb(p: jax.Array, g: jax.Array) -> jax.Array:
            return p + (g.astype(jnp.float32) * share).astype(p.dtype)

        (high, _), grads = grad_fn(jax.tree.map(climb, params, grads), batch, key, **options)
        weight = metrics.weight.astype(jnp.float32)
        rise = high.astype(jnp.float32) - loss.astype(jnp.float32)
        total = jnp.where(weight == 0, jnp.zeros_like(weight), rise * weight)
        values = {**metrics.values, "sharpness": Mean(total, weight)}
        return (loss, dataclasses.replace(metrics, values=values)), grads

    return sharp


def square_norm(tree: PyTree) -> jax.Array:
    """Return the sum of the squares of all numbers in a tree, in float32."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return sum(squares, jnp.zeros((), jnp.float32))
