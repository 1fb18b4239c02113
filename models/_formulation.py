"""Which form of a layer is fast where: the choices, as they were measured."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

ConvForm = Literal["auto", "winograd", "im2col", "shifted", "xla"]
"""How a convolution is computed; ``"auto"`` chooses."""


class ConvForms(NamedTuple):
    """The forms of one convolution: forward, and of the gradients of its input and kernel."""

    forward: str
    input: str
    kernel: str


class _Row(NamedTuple):
    """One line of the table: what it holds for, and what is fast there."""

    forms: ConvForms
    window: int | None = None
    stride: int | None = None
    least_channels: int = 1
    """Of the input and of the result."""
    most_channels: int | None = None
    """Of the input."""
    least_rows: int = 1
    least_bytes: int = 1
    """Of one number: Winograd's sums need float32."""


CONV2D_ON_CPU = (
    _Row(
        ConvForms("winograd", "winograd", "winograd"),
        window=3,
        stride=1,
        least_channels=16,
        least_rows=4,
        least_bytes=4,
    ),
    _Row(ConvForms("shifted", "shifted", "shifted"), most_channels=1),
    _Row(ConvForms("im2col", "shifted", "im2col")),
)
"""The first line that holds is taken. Measured on two cores with AVX-512, float32, jax 0.10.2:
images of 4 to 32 rows, 1 to 512 channels, batches of 32 and 64 (docs/speed.md has the figures).

XLA's own convolution is in no line: inside ``lax.scan`` it has other bits than outside, and is
more than ten times slower there.
"""


def conv2d_forms(
    kernel: tuple[int, ...], stride: int, rows: int, dtype: Any, form: ConvForm = "auto"
) -> ConvForms:
    """Return the forms of a convolution by a kernel of shape [h, w, C, F] to ``rows`` rows.

    >>> import jax.numpy as jnp
    >>> conv2d_forms((3, 3, 64, 64), 1, 32, jnp.float32).forward
    'winograd'
    >>> conv2d_forms((3, 3, 64, 64), 2, 32, jnp.float32).input
    'shifted'
    """
    height, width, channels, features = kernel
    if form == "im2col":
        return ConvForms("im2col", "shifted", "im2col" if channels > 1 else "shifted")
    if form != "auto":
        return ConvForms(form, form, form)
    for row in CONV2D_ON_CPU:
        if (
            row.window in (None, height)
            and row.window in (None, width)
            and row.stride in (None, stride)
            and min(channels, features) >= row.least_channels
            and channels <= (row.most_channels or channels)
            and rows >= row.least_rows
            and jnp.dtype(dtype).itemsize >= row.least_bytes
        ):
            return row.forms
    raise AssertionError("the last line of the table holds for everything")


def native_winograd(kernel: tuple[int, ...], stride: int, rows: int) -> bool:
    """Tell whether the convolution in C++ by a kernel [h, w, C, F] to ``rows`` rows mixes them.

    Measured as the table above, with 1 to 512 channels: where it can, it takes 0.5 to 0.9 of the
    time of the direct form, the less the more rows there are.

    >>> native_winograd((3, 3, 64, 64), 1, 32), native_winograd((3, 3, 64, 64), 2, 32)
    (True, False)
    """
    return kernel[0] == 3 and stride == 1 and rows >= 4
