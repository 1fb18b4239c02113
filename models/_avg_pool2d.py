"""Average pooling over windows that do not overlap, and over the whole image."""

import jax

from fnml.core import ShapeError
from fnml.models._wide import wide
from fnml.models._windows import windows


def avg_pool2d(x: jax.Array, window: int | tuple[int, int] = 2) -> jax.Array:
    """Return the mean of each window of ``x`` [B, H, W, C], as [B, H // h, W // w, C].

    Windows do not overlap; rows and columns that do not fill one are dropped. Sums are at least
    float32, the output has the dtype of ``x``.

    Raises:
      ShapeError: ``x`` is not [B, H, W, C], or smaller than a window.

    >>> import jax.numpy as jnp
    >>> avg_pool2d(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0].tolist()
    [[2.5, 4.5], [10.5, 12.5]]
    """
    parts = windows("avg_pool2d", x, window).split(x)
    return parts.mean((2, 4), dtype=wide(x.dtype)).astype(x.dtype)


def global_mean(x: jax.Array) -> jax.Array:
    """Return the mean over all positions of ``x`` [B, H, W, C], as [B, C], in its dtype.

    Raises:
      ShapeError: ``x`` is not [B, H, W, C].

    >>> import jax.numpy as jnp
    >>> global_mean(jnp.ones((2, 3, 3, 4))).shape
    (2, 4)
    """
    if x.ndim != 4:
        raise ShapeError(f"global_mean got x {x.shape}: expected [B, H, W, C]")
    return x.mean((1, 2), dtype=wide(x.dtype)).astype(x.dtype)
