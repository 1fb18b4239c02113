"""Two-dimensional convolution as a sum of shifted matrix products."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from fnml.core import ConfigError, ShapeError
from fnml.models._floats import refuse_integers
from fnml.models._wide import wide

Padding = Literal["SAME", "VALID"]


def _pads(size: int, window: int, stride: int, padding: Padding) -> tuple[int, int]:
    """Return what to add before and after, as TensorFlow and XLA define ``"SAME"``."""
    if padding == "VALID":
        return 0, 0
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


def conv2d(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: Padding = "SAME"
) -> jax.Array:
    """Convolve ``x`` [B, H, W, C] with ``kernel`` [h, w, C, F] to [B, H', W', F].

    The output has the dtype of ``x``; products are summed in at least float32. It equals
    ``jax.lax.conv_general_dilated`` in NHWC, HWIO to rounding, but is written as one matrix
    product per kernel position. On a CPU, XLA's own convolution gives other bits inside
    ``lax.scan`` than outside and is more than ten times slower there; this form has neither
    fault. The price is paid outside of loops, where XLA's is the faster one, above all forward
    and with many channels. It is plain JAX: every mode of differentiation works.

    Law: ``lax.scan`` over conv2d gives the bits of a Python loop over it.

    Args:
      stride: the step in both directions.
      padding: ``"SAME"`` (H' = ceil(H / stride), zeros outside) or ``"VALID"`` (no padding).

    Raises:
      ShapeError: the channels differ, the kernel does not fit into the padded image, or ``x`` holds
        integers.
      ConfigError: the stride or the padding is not one of the above.

    >>> import jax.numpy as jnp
    >>> conv2d(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 2)), stride=2).shape
    (1, 2, 2, 2)
    """
    if stride < 1:
        raise ConfigError(f"stride={stride}: expected a whole number of at least 1")
    if padding not in ("SAME", "VALID"):
        raise ConfigError(f"padding={padding!r}: expected 'SAME' or 'VALID'")
    if x.ndim != 4 or kernel.ndim != 4 or x.shape[3] != kernel.shape[2]:
        raise ShapeError(
            f"conv2d got x {x.shape} and a kernel {kernel.shape}: "
            "expected x [B, H, W, C] and a kernel [h, w, C, F]"
        )
    refuse_integers("conv2d", x)
    height, width, channels, features = kernel.shape
    rows_pad = _pads(x.shape[1], height, stride, padding)
    cols_pad = _pads(x.shape[2], width, stride, padding)
    x = jnp.pad(x, ((0, 0), rows_pad, cols_pad, (0, 0)))
    if x.shape[1] < height or x.shape[2] < width:
        raise ShapeError(
            f"conv2d got a kernel of {height} x {width} for an image of {x.shape[1]} x "
            f"{x.shape[2]} (padding included): it has to fit"
        )
    rows, cols = (x.shape[1] - height) // stride + 1, (x.shape[2] - width) // stride + 1
    accumulate = wide(x.dtype)
    out = jnp.zeros((), accumulate)
    for i in range(height):
        for j in range(width):
            shifted = lax.slice(
                x,
                (0, i, j, 0),
                (x.shape[0], i + (rows - 1) * stride + 1, j + (cols - 1) * stride + 1, channels),
                (1, stride, stride, 1),
            )
            out = out + lax.dot_general(
                shifted.reshape(-1, channels),  # [B*H'*W', C] x [C, F]
                kernel[i, j].astype(x.dtype),
                (((1,), (0,)), ((), ())),
                preferred_element_type=accumulate,
            )
    return out.astype(x.dtype).reshape(x.shape[0], rows, cols, features)
