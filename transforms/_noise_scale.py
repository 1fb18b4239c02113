"""Estimate the gradient noise scale from the shards of a batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnml.core import ConfigError, LayoutError, Mean, Metrics
from fnml.transforms._layout import GradFn, Laid, refuse_laid
from fnml.transforms._sam import square_norm

PyTree = Any

SIGNAL, NOISE = "noise_scale_signal", "noise_scale_trace"


def noise_scale(grad_fn: GradFn, lay: Callable[[GradFn], GradFn]) -> GradFn:
    """Estimate how noisy a batch's gradient is, from the gradients of its shards.

    Adds two metrics, each an unbiased estimate from this one batch: ``"noise_scale_signal"``, the
    squared norm ``|G|**2`` of the true gradient, and ``"noise_scale_trace"``, the trace ``S`` of
    the covariance of one unit of weight's gradient (an example's, or a token's). Averaged over
    many steps, as metrics are, their quotient is the noise scale, ``S / |G|**2``: the batch size
    (in units of weight) above which larger batches gain little. A single batch's quotient is
    biased and very noisy, and the estimate of ``|G|**2`` can be negative.

    With shard gradients ``g_i`` of weight ``w_i``, total ``W``, over ``n`` shards that weigh
    something, and ``A = sum_i w_i |g_i|**2 / W``:

    ``S = W (A - |g|**2) / (n - 1)`` and ``|G|**2 = |g|**2 - S / W``.

    For equal weights these are the paper's two estimators. Where fewer than two shards weigh
    something, the metrics weigh nothing. Examples have to be drawn independently of their shard.

    Law: loss, gradients and all other metrics are those of ``lay(grad_fn)``, bit for bit.

    Source: McCandlish et al. 2018, arXiv:1812.06162, appendix A.1.

    Args:
      grad_fn: a gradient function of one shard.
      lay: lays it out, such as ``lambda g: data_parallel(accumulate(g, 4), mesh)``.

    Returns:
      A function with the signature of ``grad_fn``. Laid out once more it estimates from each part
      of the batch, and the estimates are averaged.

    Raises:
      LayoutError: ``grad_fn`` is laid out already or takes a whole batch, or ``lay`` makes fewer
        than two shards; when called, the batch is a single example, as inside ``per_example``.
      ConfigError: the loss has metrics of these names (when called).

    >>> import jax, jax.numpy as jnp
    >>> from fnml.transforms import accumulate
    >>> def loss_fn(params, batch, key):
    ...     error = Mean.of(batch * params)
    ...     return error.value, Metrics(error.weight)
    >>> grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    >>> noisy = noise_scale(grad_fn, lambda g: accumulate(g, 2))
    >>> (_, metrics), _ = noisy(jnp.float32(0.0), jnp.array([1.0, 3.0]), jax.random.key(0))
    >>> {name: float(mean.value) for name, mean in metrics.values.items()}
    {'noise_scale_signal': 3.0, 'noise_scale_trace': 2.0}
    """
    if isinstance(grad_fn, Laid):
        raise LayoutError(
            "noise_scale looks at every shard's gradients, so it takes one shard's gradient "
            "function and the layout apart: noise_scale(grad_fn, lambda g: accumulate(g, n)), not "
            "noise_scale(accumulate(grad_fn, n), ...)"
        )
    refuse_laid(grad_fn, "noise_scale")

    def shard(
        params: PyTree, batch: PyTree, key: jax.Array, **options: Any
    ) -> tuple[tuple[jax.Array, Metrics], PyTree]:
        (loss, metrics), grads = grad_fn(params, batch, key, **options)
        taken = sorted({SIGNAL, NOISE} & metrics.values.keys())
        if taken:
            raise ConfigError(
                f"a loss's metrics cannot be named {taken}, the names under which noise_scale "
                "reports: rename them, or apply noise_scale once"
            )
        weight = metrics.weight.astype(jnp.float32)
        counts = weight > 0
        square = jnp.where(counts, weight * square_norm(grads), jnp.zeros_like(weight))
        # Until the shards are merged: sum of w |g|**2 with W, and in the other the shards' number.
        one = jnp.ones((), jnp.float32)
        sums = {SIGNAL: Mean(square, weight), NOISE: Mean(counts.astype(jnp.float32), one)}
        values = {**metrics.values, **sums}
        return (loss, dataclasses.replace(metrics, values=values)), grads

    layout = lay(shard)
    if not isinstance(layout, Laid) or layout.shards < 2:
        raise LayoutError(
            "noise_scale compares shards, so the layout has to make at least 2 of them, got "
            f"{layout.shards if isinstance(layout, Laid) else 'no layout'}: "
            "noise_scale(grad_fn, lambda g: accumulate(g, n))"
        )

    def estimated(
        params: PyTree, batch: PyTree, key: jax.Array, **options: Any
    ) -> tuple[tuple[jax.Array, Metrics], PyTree]:
        if {x.shape[:1] for x in jax.tree.leaves(batch)} == {(1,)}:
            raise LayoutError(
                f"noise_scale compares {layout.shards} shards of a batch, and one example has "
                "none: it cannot go inside per_example or private, which take one example's "
                "gradients. Measure apart: noise_scale(grad_fn, lambda g: accumulate(g, n))"
            )
        (loss, metrics), grads = layout(params, batch, key, **options)
        shards = metrics.values[NOISE].total
        some = (shards > 1).astype(jnp.float32)
        weight = jnp.where(shards > 1, metrics.weight.astype(jnp.float32), 1.0)
        whole = square_norm(grads)
        spread = metrics.values[SIGNAL].total / weight - whole
        trace = weight * spread / jnp.maximum(shards - 1, 1.0)
        signal = whole - trace / weight
        values = {
            **metrics.values,
            SIGNAL: Mean(some * signal, some),
            NOISE: Mean(some * trace, some),
        }
        return (loss, dataclasses.replace(metrics, values=values)), grads

    return estimated
