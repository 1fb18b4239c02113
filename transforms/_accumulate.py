"""Accumulate gradients over micro-batches, exactly."""

from typing import Any

import jax
from jax import lax

from fnml.core import LayoutError
from fnml.transforms._layout import GradFn, Laid, Sums, check_blocks, laid, ordered_sum, split_batch

PyTree = Any


def accumulate(grad_fn: GradFn, count: int) -> GradFn:
    """Compute a batch's gradients in ``count`` micro-batches, one after the other.

    Memory for activations falls to that of one micro-batch. Micro-batches are weighted by
    ``metrics.weight``, so unequal token masks give the gradient of the whole batch's mean, not
    the mean of means. Metrics and model statistics merge exactly. Sums are kept in float32 and
    go pairwise in one fixed order.

    Micro-batch ``i`` is logical shard ``i``: the examples ``[i * B / count, (i + 1) * B / count)``
    and the key ``shard_key(key, i)``.

    Law: for a loss that draws no random numbers,
    ``accumulate(g, n)(params, batch, key) == g(params, batch, key)`` up to rounding; for one that
    does, it is the weighted mean of ``g(params, shard_i, shard_key(key, i))``. Bitwise,
    ``accumulate(accumulate(g, a), b) == accumulate(g, a * b)`` for ``a`` a power of two.

    Args:
      grad_fn: ``grad_fn(params, batch, key, **options) -> ((loss, metrics), grads)``.
      count: the number of micro-batches; it divides the batch's leading axis.

    Returns:
      A function with the signature of ``grad_fn``.

    Raises:
      LayoutError: ``count`` is below 1, ``grad_fn`` is itself laid out over a number of shards
        that is no power of two, or ``count`` does not divide the batch (when called).

    >>> import jax, jax.numpy as jnp
    >>> from fnml.core import Mean, Metrics
    >>> def loss_fn(params, batch, key):
    ...     error = Mean.of((batch["x"] * params - 1.0) ** 2)
    ...     return error.value, Metrics(error.weight, {"mse": error})
    >>> grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    >>> args = jnp.float32(2.0), {"x": jnp.arange(4.0)}, jax.random.key(0)
    >>> accumulate(grad_fn, 2)(*args)[1] == grad_fn(*args)[1]
    Array(True, dtype=bool)
    """
    if count < 1:
        raise LayoutError(f"accumulate needs at least 1 micro-batch, got {count}")
    inner = laid(grad_fn)
    check_blocks(inner, "accumulate")

    def sums(
        params: PyTree, batch: PyTree, key: jax.Array, first: jax.Array, options: dict[str, Any]
    ) -> Sums:
        parts = split_batch(batch, count)

        def part(i: jax.Array) -> Sums:
            micro = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), parts)
            return inner.sums(params, micro, key, first + i * inner.shards, options)

        return ordered_sum(part, count)

    return Laid(count * inner.shards, sums, inner.devices)
