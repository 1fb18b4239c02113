"""Two-dimensional convolution, in the form that is fast where it runs."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax import lax

from fnml.core import ConfigError, ShapeError, divided, nearest
from fnml.models import _conv_forms as forms
from fnml.models import _conv_native
from fnml.models._conv_forms import Slide
from fnml.models._floats import refuse_integers
from fnml.models._formulation import ConvForm, ConvForms, conv2d_forms
from fnml.pallas_kernels.native import active, faults_of, on_cpu

Padding = Literal["SAME", "VALID"]
_Form = Callable[..., jax.Array]

_FORWARD: dict[str, Callable[..., jax.Array]] = {
    "winograd": forms.winograd,
    "im2col": forms.im2col,
    "shifted": forms.shifted,
}
_INPUT_GRADIENT = {
    "winograd": forms.winograd_input_gradient,
    "shifted": forms.shifted_input_gradient,
}
_KERNEL_GRADIENT = {
    "winograd": forms.winograd_kernel_gradient,
    "im2col": forms.im2col_kernel_gradient,
    "shifted": forms.shifted_kernel_gradient,
}


class _Plan(NamedTuple):
    """What is known of a convolution while it is traced."""

    slide: Slide
    forms: ConvForms
    everywhere: bool
    """Whether these forms hold on every platform, instead of XLA's own on all but a CPU."""
    native: bool
    """Whether C++ takes their place on a CPU."""

    def run(self, ours: _Form, xla: _Form, native: _Form, *operands: jax.Array) -> jax.Array:
        def otherwise(*operands: jax.Array) -> jax.Array:
            if self.everywhere:
                return ours(*operands, self.slide)
            return lax.platform_dependent(
                *operands,
                cpu=lambda *operands: ours(*operands, self.slide),
                default=lambda *operands: xla(*operands, self.slide),
            )

        if not self.native:
            return otherwise(*operands)
        out: jax.Array = on_cpu(
            lambda *operands: native(*operands, self.slide), otherwise, *operands
        )
        return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv2d(x: jax.Array, kernel: jax.Array, plan: _Plan) -> jax.Array:
    return plan.run(_FORWARD[plan.forms.forward], forms.xla, _conv_native.native, x, kernel)


def _forward(x: jax.Array, kernel: jax.Array, plan: _Plan) -> Any:
    return _conv2d(x, kernel, plan), (x, kernel)


def _backward(
    plan: _Plan, residuals: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    to_x, to_kernel = _INPUT_GRADIENT[plan.forms.input], _KERNEL_GRADIENT[plan.forms.kernel]
    return (
        plan.run(
            to_x, forms.xla_input_gradient, _conv_native.native_input_gradient, *residuals, grad
        ),
        plan.run(
            to_kernel,
            forms.xla_kernel_gradient,
            _conv_native.native_kernel_gradient,
            *residuals,
            grad,
        ),
    )


_conv2d.defvjp(_forward, _backward)


def _pads(size: int, window: int, stride: int, padding: Padding) -> tuple[int, int]:
    """Return what to add before and after, as TensorFlow and XLA define ``"SAME"``."""
    if padding == "VALID":
        return 0, 0
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


def _refuse(x: jax.Array, kernel: jax.Array, stride: int, padding: str, form: str) -> None:
    if stride < 1:
        raise ConfigError(f"stride={stride}: expected a whole number of at least 1")
    if padding not in ("SAME", "VALID"):
        raise ConfigError(f"padding={padding!r}: expected 'SAME' or 'VALID'")
    if form not in get_args(ConvForm):
        known = get_args(ConvForm)
        raise ConfigError(
            f"form={form!r}: expected one of {', '.join(map(repr, known))}."
            f"{nearest(form, list(known))}"
        )
    if x.ndim != 4 or kernel.ndim != 4 or x.shape[3] != kernel.shape[2]:
        raise ShapeError(
            f"conv2d got x {x.shape} and a kernel {kernel.shape}: "
            "expected x [B, H, W, C] and a kernel [h, w, C, F]"
        )
    refuse_integers("conv2d", x)
    if form == "winograd" and (kernel.shape[:2] != (3, 3) or stride != 1):
        raise ConfigError(
            f"form='winograd' got a kernel of {kernel.shape[0]} x {kernel.shape[1]} and "
            f"stride={stride}: expected 3 x 3 and 1, or form='auto'"
        )


def conv2d(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int = 1,
    padding: Padding = "SAME",
    form: ConvForm = "auto",
) -> jax.Array:
    """Convolve ``x`` [B, H, W, C] with ``kernel`` [h, w, C, F] to [B, H', W', F].

    The output has the dtype of ``x``; on a CPU, products are summed in at least float32. It equals
    ``jax.lax.conv_general_dilated`` in NHWC, HWIO to rounding. ``"auto"`` is that operation where
    the program is lowered for a GPU or TPU. On a CPU XLA's convolution has other bits inside
    ``lax.scan`` than outside and is more than ten times slower there, so the convolution and
    its two gradients are matrix products, of the kinds that were measured fastest for the shapes
    (see docs/speed.md). Another ``form`` holds on every platform:

    - ``"winograd"``: half the products; for 3 x 3 kernels with stride 1. Rounding is a few times
      that of the others (about 1e-6 in float32, relative).
    - ``"im2col"``: one product with all that each output sees side by side.
    - ``"shifted"``: one product for each of the kernel's positions.
    - ``"xla"``: XLA's own operation, which breaks the law below on a CPU.

    Within :func:`fnml.pallas_kernels.native_kernels`, ``"auto"`` is C++ on a CPU, for float32: the
    products are summed in registers while the image is read where it lies, what is outside the
    image is not multiplied, and kernels of three rows with stride 1 go through Winograd's form.

    The first two and ``"auto"`` have a custom VJP, so there is no forward mode (``jax.jvp``);
    reverse over reverse works. The last two know every mode.

    Law: ``lax.scan`` over conv2d gives the bits of a Python loop over it.

    Source: Lavin and Gray 2016, arXiv:1509.09308 (``"winograd"``, here along the rows only).

    Args:
      stride: the step in both directions.
      padding: ``"SAME"`` (H' = ceil(H / stride), zeros outside) or ``"VALID"`` (no padding).
      form: how it is computed.

    Raises:
      ShapeError: the channels differ, the kernel does not fit into the padded image, or ``x`` holds
        integers.
      ConfigError: the stride, the padding or the form is not one of the above.

    >>> import jax.numpy as jnp
    >>> conv2d(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 2)), stride=2).shape
    (1, 2, 2, 2)
    """
    _refuse(x, kernel, stride, padding, form)
    height, width = kernel.shape[:2]
    slide = Slide(
        stride,
        _pads(x.shape[1], height, stride, padding),
        _pads(x.shape[2], width, stride, padding),
    )
    if x.shape[1] + sum(slide.rows) < height or x.shape[2] + sum(slide.cols) < width:
        raise ShapeError(
            f"conv2d got a kernel of {height} x {width} for an image of "
            f"{x.shape[1] + sum(slide.rows)} x {x.shape[2] + sum(slide.cols)} (padding included): "
            "it has to fit"
        )
    if form == "xla":
        return forms.xla(x, kernel, slide)
    if form == "shifted":
        return forms.shifted(x, kernel, slide)
    chosen = conv2d_forms(kernel.shape, stride, slide.outputs(x, kernel)[0], x.dtype, form)
    # The compiler cannot divide a call of C++ over devices.
    native = form == "auto" and active() and not divided() and not faults_of(x=x, kernel=kernel)
    return _conv2d(x, kernel, _Plan(slide, chosen, form != "auto", native))
