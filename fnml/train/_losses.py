"""Losses and scores, as exact means over what counts."""

import jax
import jax.numpy as jnp

from fnml.core import Mean, ShapeError
from fnml.pallas_kernels import Implementation, linear_cross_entropy


def _check_labels(logits: jax.Array, labels: jax.Array, weights: jax.Array | None) -> None:
    faults = []
    if labels.shape != logits.shape[:-1]:
        faults.append(f"labels {labels.shape}, expected {logits.shape[:-1]}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        faults.append(f"labels of {labels.dtype}, expected integers")
    if weights is not None and weights.shape != logits.shape[:-1]:
        faults.append(f"weights {weights.shape}, expected {logits.shape[:-1]}")
    if faults:
        raise ShapeError(f"for logits {logits.shape}: " + "; ".join(faults))


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    weights: jax.Array | None = None,
    label_smoothing: float = 0.0,
) -> Mean:
    """Average the cross entropy of class labels, in nats.

    With smoothing ``s`` the target is ``1 - s`` on the label plus ``s / V`` on every class
    (Szegedy et al. 2016, "Rethinking the Inception architecture", section 7).

    Args:
      logits: ``[..., V]`` floats; computed in float32.
      labels: ``[...]`` integers in ``[0, V)``.
      weights: ``[...]`` weight of each label, 0 to leave it out; ``None`` for 1.
      label_smoothing: ``s`` in ``[0, 1)``.

    Returns:
      A :class:`fnml.Mean` over the labels that count.

    Raises:
      ShapeError: shapes or dtypes do not fit; all of them are listed.

    >>> import jax.numpy as jnp
    >>> float(cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3])).value)
    1.3862943649291992
    """
    _check_labels(logits, labels, weights)
    logits = logits.astype(jnp.float32)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    # A comparison with an iota fuses into one pass; a gather's gradient would be a scatter.
    # In the labels' own dtype, such as uint8, the iota could wrap around.
    classes = jnp.arange(logits.shape[-1], dtype=jnp.int32).reshape((1,) * labels.ndim + (-1,))
    hit = labels.astype(jnp.int32)[..., None] == classes
    chosen = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    if label_smoothing:
        chosen = (1 - label_smoothing) * chosen + label_smoothing * jnp.mean(logits, axis=-1)
    return Mean.of(normalizer - chosen, weights)


def next_token(
    logits: jax.Array,
    targets: jax.Array,
    *,
    mask: jax.Array | None = None,
    label_smoothing: float = 0.0,
) -> Mean:
    """Average the cross entropy of the next token, in nats per token.

    Args:
      logits: ``[B, T, V]``, position ``t`` predicting ``targets[:, t]``.
      targets: ``[B, T]`` integers, the inputs shifted left by one.
      mask: ``[B, T]`` or ``[B]`` (whole sequences), nonzero where the token counts.
      label_smoothing: see :func:`cross_entropy`.

    Law: with unequal masks, the mean over a batch equals the merged means over its parts.

    Raises:
      ShapeError: see :func:`cross_entropy`.

    >>> import jax.numpy as jnp
    >>> logits, targets = jnp.zeros((1, 3, 8)), jnp.zeros((1, 3), jnp.int32)
    >>> float(next_token(logits, targets, mask=jnp.array([[1.0, 1.0, 0.0]])).weight)
    2.0
    """
    if mask is not None and mask.ndim == 1 and targets.ndim == 2:
        mask = jnp.broadcast_to(mask[:, None], (mask.shape[0], targets.shape[1]))
    return cross_entropy(logits, targets, weights=mask, label_smoothing=label_smoothing)


def linear_next_token(
    features: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    *,
    mask: jax.Array | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    implementation: Implementation = "auto",
) -> Mean:
    """Average :func:`next_token` of the logits ``features @ kernel``, which are never all in memory.

    Args:
      features: ``[B, T, D]``, what the model's head reads.
      kernel: ``[D, V]`` of the same dtype.
      targets: ``[B, T]`` integers, the inputs shifted left by one.
      mask: as in :func:`next_token`.
      label_smoothing: see :func:`cross_entropy`.
      z_loss: ``z``, to add ``z * log(Z) ** 2`` with Z the softmax' denominator.
      implementation: see :func:`fnml.pallas_kernels.linear_cross_entropy`.

    Law: equals ``next_token(features @ kernel, ...)`` to rounding, gradients included.

    Raises:
      ShapeError: shapes or dtypes do not fit; all of them are listed.

    >>> import jax.numpy as jnp
    >>> features, kernel = jnp.zeros((1, 3, 4)), jnp.ones((4, 8))
    >>> float(linear_next_token(features, kernel, jnp.zeros((1, 3), jnp.int32)).value)
    2.079441547393799
    """
    if mask is not None and mask.ndim == 1 and targets.ndim == 2:
        mask = jnp.broadcast_to(mask[:, None], (mask.shape[0], targets.shape[1]))
    try:
        total, weight = linear_cross_entropy(
            features,
            kernel,
            targets,
            weights=None if mask is None else mask.astype(jnp.float32),
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            implementation=implementation,
        )
    except ValueError as error:
        raise ShapeError(str(error)) from error
    return Mean(total, weight)


def accuracy(logits: jax.Array, labels: jax.Array, *, weights: jax.Array | None = None) -> Mean:
    """Average how often the largest logit is the label's.

    Shapes as in :func:`cross_entropy`. Of equal logits the first class wins.

    >>> import jax.numpy as jnp
    >>> float(accuracy(jnp.array([[0.0, 1.0], [0.0, 1.0]]), jnp.array([1, 0])).value)
    0.5
    """
    _check_labels(logits, labels, weights)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return Mean.of(best == labels.astype(jnp.int32), weights)


def mse(predictions: jax.Array, targets: jax.Array, *, weights: jax.Array | None = None) -> Mean:
    """Average the squared error over all elements, both arguments ``[...]`` of one shape.

    Raises:
      ShapeError: the shapes differ (nothing is broadcast).

    >>> import jax.numpy as jnp
    >>> float(mse(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])).value)
    2.0
    """
    if predictions.shape != targets.shape:
        raise ShapeError(
            f"mse compares arrays of one shape, got predictions {predictions.shape} and "
            f"targets {targets.shape}: reshape one of them, nothing is broadcast"
        )
    error = predictions.astype(jnp.float32) - targets.astype(jnp.float32)
    return Mean.of(jnp.square(error), weights)
