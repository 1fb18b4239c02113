"""Gradients of each example on its own."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnml.core import LayoutError, Metrics, shard_key
from fnml.transforms._layout import GradFn, Whole, refuse_laid, split_batch

PyTree = Any


def per_example(grad_fn: GradFn, chunk: int | None = None) -> GradFn:
    """Compute the loss, metrics and gradients of each example of a batch on its own.

    Example ``i`` is a batch of one, with the key ``shard_key(key, i)``. Gradients of ``chunk``
    examples are computed at a time, so activations take the memory of one chunk; the result
    itself holds ``B`` gradients.

    Law: for a loss that draws no random numbers and couples no examples, the mean of
    ``per_example(g)``'s gradients, weighted by its ``metrics.weight``, equals ``g``'s up to
    rounding; any ``chunk`` gives the same values up to rounding.

    Args:
      grad_fn: ``grad_fn(params, batch, key, **options) -> ((loss, metrics), grads)``.
      chunk: examples computed together; it divides the batch. ``None`` for all of them.

    Returns:
      A function with the arguments of ``grad_fn``; every array it returns has a leading axis B.

    Raises:
      LayoutError: ``grad_fn`` is laid out over shards, ``chunk`` is below 1, or it does not divide
        the batch (when called).

    >>> import jax, jax.numpy as jnp
    >>> from fnml.core import Mean
    >>> def loss_fn(params, batch, key):
    ...     error = Mean.of((batch - params) ** 2)
    ...     return error.value, Metrics(error.weight)
    >>> each = per_example(jax.value_and_grad(loss_fn, has_aux=True))
    >>> _, grads = each(jnp.float32(0), jnp.array([1.0, 3.0]), jax.random.key(0))
    >>> grads.tolist()
    [-2.0, -6.0]
    """
    refuse_laid(grad_fn, "per_example", "bound its memory with per_example(grad_fn, chunk=...)")
    if chunk is not None and chunk < 1:
        raise LayoutError(f"per_example needs chunks of at least 1 example, got {chunk}")

    def each(
        params: PyTree, batch: PyTree, key: jax.Array, **options: Any
    ) -> tuple[tuple[jax.Array, Metrics], PyTree]:
        size = len(jax.tree.leaves(batch)[0])
        examples = split_batch(batch, size)  # every leaf [B, 1, ...]

        def one(example: PyTree, i: jax.Array) -> tuple[tuple[jax.Array, Metrics], PyTree]:
            return grad_fn(params, example, shard_key(key, i), **options)

        indices = jnp.arange(size, dtype=jnp.int32)
        if chunk is None or chunk == size:
            return jax.vmap(one)(examples, indices)
        if size % chunk:
            raise LayoutError(
                f"per_example cannot divide a batch of {size} examples into chunks of {chunk}: "
                "use a divisor of the batch size"
            )
        chunks = split_batch((examples, indices), size // chunk)
        out = lax.map(lambda part: jax.vmap(one)(*part), chunks)
        return jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), out)

    why = (
        "it returns a gradient for each example, and a layout would add them up: bound its memory "
        "with per_example(grad_fn, chunk=...)"
    )
    return Whole(each, "per_example", why)
