"""Cut an image into windows that do not overlap, by reshaping."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fnml.core import ShapeError


class Windows(NamedTuple):
    """Windows of ``height`` by ``width``."""

    height: int
    width: int

    def split(self, x: jax.Array) -> jax.Array:
        """Cut [B, H, W, C] into [B, H', h, W', w, C], dropping what fills no window."""
        batch, rows, cols, channels = x.shape
        rows, cols = rows // self.height, cols // self.width
        x = x[:, : rows * self.height, : cols * self.width]
        return x.reshape(batch, rows, self.height, cols, self.width, channels)

    def join(self, parts: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Undo :meth:`split` into ``shape``, with zeros where something was dropped."""
        batch, rows, _, cols, _, channels = parts.shape
        x = parts.reshape(batch, rows * self.height, cols * self.width, channels)
        return jnp.pad(x, [(0, full - got) for full, got in zip(shape, x.shape, strict=True)])


def windows(function: str, x: jax.Array, window: int | tuple[int, int]) -> Windows:
    """Return the windows of ``function`` over ``x``.

    Raises:
      ShapeError: ``x`` is not [B, H, W, C], or smaller than a window.
    """
    over = Windows(window, window) if isinstance(window, int) else Windows(*window)
    if x.ndim != 4:
        raise ShapeError(f"{function} got x {x.shape}: expected [B, H, W, C]")
    if not (1 <= over.height <= x.shape[1] and 1 <= over.width <= x.shape[2]):
        raise ShapeError(
            f"{function} got a window of {over.height} x {over.width} for an image of "
            f"{x.shape[1]} x {x.shape[2]}: it has to be at least 1 x 1 and fit into the image"
        )
    return over
