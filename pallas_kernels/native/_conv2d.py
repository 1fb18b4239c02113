"""Two-dimensional convolution on CPUs in C++: products from registers, nothing side by side."""

from typing import NamedTuple

import jax
import numpy as np

from fnml.pallas_kernels.native._call import call, floats

_FEATURES = 64
"""About as many as one piece of work has (``kFeatures`` in ``cc/gather.h``, for wide vectors)."""


class Window(NamedTuple):
    """How a kernel lies on an image, and how it is multiplied.

    Attributes:
      stride: its step.
      top: the rows of zeros before the image.
      left: the columns of zeros before it.
      winograd: whether rows are mixed first, for kernels of three rows and a stride of 1.
    """

    stride: int
    top: int
    left: int
    winograd: bool

    def attributes(self) -> dict[str, np.int64]:
        """Return what the C++ functions are told."""
        return {name: np.int64(value) for name, value in self._asdict().items()}


def conv2d_forward(
    x: jax.Array, kernel: jax.Array, size: tuple[int, int], window: Window
) -> jax.Array:
    """Convolve ``x`` [B, H, W, C] with ``kernel`` [h, w, C, F] to [B, H', W', F], of ``size``."""
    result = floats(x.shape[0], *size, kernel.shape[3])
    out: jax.Array = call("fnml_conv2d_forward", result, x, kernel, **window.attributes())
    return out


def conv2d_input_gradient(
    kernel: jax.Array, grad: jax.Array, size: tuple[int, int], window: Window
) -> jax.Array:
    """Return the gradient [B, H, W, C] of an input of ``size`` from that of the result."""
    result = floats(grad.shape[0], *size, kernel.shape[2])
    out: jax.Array = call("fnml_conv2d_input_gradient", result, kernel, grad, **window.attributes())
    return out


def conv2d_kernel_gradient(
    x: jax.Array, grad: jax.Array, size: tuple[int, int], window: Window
) -> jax.Array:
    """Return the gradient [h, w, C, F] of a kernel of ``size`` from that of the result.

    It is the sum of parts that depend on the shapes alone, not on how many threads there are.
    """
    channels, features = x.shape[3], grad.shape[3]
    blocks = -(-features // _FEATURES)
    # Each part has a thousand pixels; there is work for at least 16 threads where there is enough.
    parts = max(1, min(-(-16 // blocks), grad.size // features // 960))
    # Whole vectors of features can be added up in place.
    in_place = parts == 1 and features % 16 == 0
    result = floats(*size, channels, features)
    partial = floats(0 if in_place else parts, *size, channels, -(-features // 16) * 16)
    out: jax.Array
    out, _ = call("fnml_conv2d_kernel_gradient", (result, partial), x, grad, **window.attributes())
    return out
