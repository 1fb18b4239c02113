"""Batch normalisation whose statistics merge exactly over shards."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnml.core import Mean, Param
from fnml.models._broadcast import along_last
from fnml.models._wide import wide

PyTree = Any


def batch_norm_state(channels: int) -> dict[str, Param]:
    """Describe the state of one :func:`batch_norm`: the moments ``"mean"`` and ``"square"``, [C].

    >>> sorted(batch_norm_state(8))
    ['mean', 'square']
    """
    return {
        "mean": Param((channels,), ("conv_out",), jax.nn.initializers.zeros),
        "square": Param((channels,), ("conv_out",), jax.nn.initializers.ones),
    }


def batch_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    state: PyTree,
    train: bool,
    eps: float = 1e-5,
) -> tuple[jax.Array, PyTree]:
    """Normalise each channel of ``x`` [..., C]; return the result and its statistics.

    With ``train`` the mean and variance are those of ``x``, which is one logical shard of the
    batch, and ``stats`` is ``{"mean": Mean, "square": Mean}``: the sums of ``x`` and of ``x**2``
    over everything but the channels, [C], with the number of elements as weight, [C], without
    gradient. Otherwise they come from ``state`` and ``stats`` is ``()``.

    State keeps E[x] and E[x**2], not the variance, because these two are means: shards merge by
    addition, and an average over steps of E[x**2] is the E[x**2] of what those steps saw. The
    variance of a union is not the mean of the variances. ``var = E[x**2] - E[x]**2`` is formed at
    evaluation, in float32 and not below 0; it cancels where \\|mean\\| is thousands of times the
    standard deviation, which inputs that follow a linear layer do not show.

    Computed in at least float32, returned in the dtype of ``x``.

    Law: the merged ``stats`` of the parts of a batch are the ``stats`` of the batch, to rounding.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1.

    Raises:
      ShapeError: ``scale``, ``bias`` or a state array is not [C].

    >>> import jax.numpy as jnp
    >>> state = {"mean": jnp.zeros(1), "square": jnp.ones(1)}
    >>> x = jnp.array([[1.0], [3.0]])
    >>> y, stats = batch_norm(x, jnp.ones(1), jnp.zeros(1), state=state, train=True, eps=0.0)
    >>> y.tolist(), stats["square"].value.tolist()
    ([[-1.0], [1.0]], [5.0])
    """
    full = x.astype(wide(x.dtype))
    axes = tuple(range(x.ndim - 1))
    stats: PyTree = ()
    if train:
        mean = jnp.mean(full, axes)
        centred = full - along_last("batch_norm mean", mean, full)
        # The centred form does not cancel; the moments that leave are for the running average.
        variance = jnp.mean(centred * centred, axes)
        count = jnp.full_like(mean, x.size // x.shape[-1])
        moments = {"mean": mean, "square": variance + mean * mean}
        stats = jax.tree.map(lambda m: Mean(m * count, count), lax.stop_gradient(moments))
    else:
        mean = state["mean"].astype(full.dtype)
        centred = full - along_last("batch_norm state 'mean'", mean, full)
        square = state["square"].astype(full.dtype)
        variance = jnp.maximum(square - mean * mean, jnp.zeros_like(mean))
    gain = lax.rsqrt(variance + eps)
    gain = along_last("batch_norm state 'square'", gain, full)
    gain = gain * along_last("batch_norm scale", scale, full)
    return (centred * gain + along_last("batch_norm bias", bias, full)).astype(x.dtype), stats
