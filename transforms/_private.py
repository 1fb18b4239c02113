"""Differentially private gradients: clip each example's, add noise to their sum."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fnml.core import (
    ConfigError,
    LayoutError,
    Metrics,
    fold_name,
    map_with_name,
    require,
    shard_key,
)
from fnml.transforms._layout import GradFn, Whole, ordered_sum, refuse_laid, split_batch

PyTree = Any
_WHY = (
    "noise may be added only once for a batch, so the layout goes inside: "
    "private(grad_fn, ..., layout=lambda g: accumulate(g, n))"
)


def private(
    grad_fn: GradFn,
    *,
    clip: float,
    noise: float,
    chunk: int | None = None,
    layout: Callable[[GradFn], GradFn] = lambda grad_fn: grad_fn,
) -> GradFn:
    """Clip every example's gradient and add Gaussian noise to their mean (DP-SGD).

    Each example's gradient over all parameters is scaled down to the norm ``clip`` if it is
    longer; noise of standard deviation ``noise * clip`` is added once to the sum, and the sum is
    divided by the number of examples ``B``, which does not depend on the data. The loss and the
    metrics are those of the batch and are not private.

    Noise may be added only once per batch, so this goes outside of a layout, and the layout
    inside: ``private(g, ..., layout=lambda g: data_parallel(accumulate(g, 4), mesh))``.

    Law: with ``noise=0`` the result is ``mean_i(g_i * min(1, clip / |g_i|))`` over the examples'
    own gradients; the noise depends on the key alone.

    Args:
      grad_fn: ``grad_fn(params, batch, key, **options) -> ((loss, metrics), grads)``.
      clip: the largest norm of one example's gradient, C.
      noise: the noise multiplier, sigma.
      chunk: examples whose gradients are held at once; it divides a shard. ``None`` for all.
      layout: lays the clipped sum out over micro-batches and devices.

    Raises:
      ConfigError: ``clip`` is not positive, or ``noise`` is negative.
      LayoutError: ``grad_fn`` is laid out already, or ``chunk`` does not divide the batch.

    Source: Abadi et al. 2016, "Deep learning with differential privacy", algorithm 1.

    >>> import jax, jax.numpy as jnp
    >>> from fnml.core import Mean
    >>> def loss_fn(params, batch, key):
    ...     error = Mean.of((batch - params) ** 2)
    ...     return error.value, Metrics(error.weight)
    >>> grad_fn = private(jax.value_and_grad(loss_fn, has_aux=True), clip=4.0, noise=0.0)
    >>> float(grad_fn(jnp.float32(0), jnp.array([1.0, 3.0]), jax.random.key(0))[1])
    -3.0
    """
    if not clip > 0 or noise < 0:
        raise ConfigError(f"private needs clip > 0 and noise >= 0, got {clip} and {noise}")
    refuse_laid(grad_fn, "private", _WHY)
    clipped = layout(_clipped(grad_fn, clip, chunk))

    def noisy(
        params: PyTree, batch: PyTree, key: jax.Array, **options: Any
    ) -> tuple[tuple[jax.Array, Metrics], PyTree]:
        (loss, metrics), grads = clipped(params, batch, key, **options)
        source = fold_name(key, "private")

        def disturb(name: str, grad: jax.Array) -> jax.Array:
            draw = jax.random.normal(fold_name(source, name), grad.shape, jnp.float32)
            share = noise * clip / metrics.weight
            return grad + (share * draw).astype(grad.dtype)

        return (loss, metrics), map_with_name(disturb, grads)

    return Whole(noisy, "private", _WHY)


def _clipped(grad_fn: GradFn, clip: float, chunk: int | None) -> GradFn:
    """Return the mean of clipped gradients, each example counting 1 whatever its own weight."""

    def mean(
        params: PyTree, batch: PyTree, key: jax.Array, **options: Any
    ) -> tuple[tuple[jax.Array, Metrics], PyTree]:
        size = len(jax.tree.leaves(batch)[0])
        step = size if chunk is None else chunk
        if size % step:
            raise LayoutError(
                f"private cannot divide {size} examples into chunks of {step}: use a divisor"
            )
        indexed = (split_batch(batch, size), jnp.arange(size, dtype=jnp.int32))
        chunks = split_batch(indexed, size // step)

        def one(example: PyTree, i: jax.Array) -> PyTree:
            (loss, metrics), grads = grad_fn(params, example, shard_key(key, i), **options)
            norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
            scale = jnp.minimum(1.0, clip / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
            grads = jax.tree.map(lambda g: g.astype(jnp.float32) * scale, grads)
            return loss.astype(jnp.float32), grads, metrics.values, metrics.stats

        def sums(c: jax.Array) -> PyTree:
            part = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, c, keepdims=False), chunks)
            return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.vmap(one)(*part))

        loss, grads, values, stats = ordered_sum(sums, size // step)
        grads = jax.tree.map(lambda g, p: (g / size).astype(p.dtype), grads, params)
        return (loss / size, Metrics(jnp.float32(size), values, stats)), grads

    return mean


def privacy_spent(
    *, noise: float, batch_size: int, examples: int, steps: int, delta: float
) -> float:
    """Return the epsilon of (epsilon, delta)-differential privacy that a run has spent.

    The accountant (extra ``privacy``) composes Gaussian mechanisms with Renyi divergences and
    takes each batch for a Poisson sample of rate ``batch_size / examples``; an epoch's shuffle,
    which :class:`fnml.data.Batches` makes, is not quite that, as in most implementations.

    Raises:
      ConfigError: a number is out of range.
      MissingExtraError: the accountant's package is not installed.

    Source: Mironov et al. 2019, "Renyi differential privacy of the sampled Gaussian mechanism".
    """
    if not (noise > 0 and 0 < batch_size <= examples and steps >= 0 and 0 < delta < 1):
        raise ConfigError(
            "privacy_spent needs noise > 0, 0 < batch_size <= examples, steps >= 0 and delta in "
            f"(0, 1), got noise={noise}, batch_size={batch_size}, examples={examples}, "
            f"steps={steps}, delta={delta}"
        )
    accounting: Any = require("dp_accounting", extra="privacy")
    gaussian = accounting.GaussianDpEvent(noise)
    sampled = accounting.PoissonSampledDpEvent(batch_size / examples, gaussian)
    accountant = accounting.rdp.RdpAccountant()
    accountant.compose(sampled, steps)
    return float(accountant.get_epsilon(delta))
