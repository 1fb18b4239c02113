"""Two-dimensional convolution by C++ on a CPU, called as the other forms are."""

import jax

from fnml.models._conv_forms import Slide
from fnml.models._formulation import native_winograd
from fnml.pallas_kernels.native import (
    Window,
    conv2d_forward,
    conv2d_input_gradient,
    conv2d_kernel_gradient,
)


def _window(x: jax.Array, kernel: jax.Array, slide: Slide) -> Window:
    winograd = native_winograd(kernel.shape, slide.stride, slide.outputs(x, kernel)[0])
    return Window(slide.stride, slide.rows[0], slide.cols[0], winograd)


def native(x: jax.Array, kernel: jax.Array, slide: Slide) -> jax.Array:
    """Convolve."""
    return conv2d_forward(x, kernel, slide.outputs(x, kernel), _window(x, kernel, slide))


def native_input_gradient(
    x: jax.Array, kernel: jax.Array, grad: jax.Array, slide: Slide
) -> jax.Array:
    """Return the input's gradient."""
    size = x.shape[1], x.shape[2]
    return conv2d_input_gradient(kernel, grad, size, _window(x, kernel, slide))


def native_kernel_gradient(
    x: jax.Array, kernel: jax.Array, grad: jax.Array, slide: Slide
) -> jax.Array:
    """Return the kernel's gradient."""
    size = kernel.shape[0], kernel.shape[1]
    return conv2d_kernel_gradient(x, grad, size, _window(x, kernel, slide))
