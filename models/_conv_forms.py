"""Two-dimensional convolution as matrix products, with the two gradients of each form.

Every form is lawful in a loop: unlike XLA's own convolution on a CPU, it has the bits and the speed
there that it has outside. Images are [B, H, W, C], kernels [h, w, C, F], results [B, H', W', F].

They are written in ``lax`` where ``jnp`` would say the same: a network's convolutions are a thousand
operations, and each takes a third of the time to trace.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnml.models._wide import wide


class Slide(NamedTuple):
    """How a kernel moves over an image: its step, and the zeros before and after each axis."""

    stride: int
    rows: tuple[int, int]
    cols: tuple[int, int]

    def outputs(self, x: jax.Array, kernel: jax.Array) -> tuple[int, int]:
        """Return H' and W'."""
        height = (x.shape[1] + sum(self.rows) - kernel.shape[0]) // self.stride + 1
        return height, (x.shape[2] + sum(self.cols) - kernel.shape[1]) // self.stride + 1


def _dot(a: jax.Array, b: jax.Array, over: tuple[int, int], batched: bool = False) -> jax.Array:
    batch = ((0,), (0,)) if batched else ((), ())
    dimensions = (((over[0],), (over[1],)), batch)
    return lax.dot_general(a, b, dimensions, preferred_element_type=wide(a.dtype))


def _pad(x: jax.Array, rows: tuple[int, int], cols: tuple[int, int]) -> jax.Array:
    """Add zeros around each image; a negative number takes away."""
    config = ((0, 0, 0), (*rows, 0), (*cols, 0), (0, 0, 0))
    return lax.pad(x, np.zeros((), x.dtype), config)


def _at(x: jax.Array, index: tuple[int | None, ...]) -> jax.Array:
    """Take ``x[index]``, where ``None`` is all of an axis and an axis that is left out."""
    index += (None,) * (x.ndim - len(index))
    pairs = [(0, n) if i is None else (i, i + 1) for i, n in zip(index, x.shape, strict=True)]
    part = lax.slice(x, [low for low, _ in pairs], [high for _, high in pairs])
    return lax.squeeze(part, [axis for axis, i in enumerate(index) if i is not None])


def xla(x: jax.Array, kernel: jax.Array, slide: Slide) -> jax.Array:
    """Convolve by XLA's own operation."""
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (slide.stride, slide.stride),
        (slide.rows, slide.cols),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _positions(x: jax.Array, kernel: jax.Array, slide: Slide) -> list[jax.Array]:
    """Return what each of the kernel's positions meets: h * w arrays [B, H', W', C]."""
    height, width, step = kernel.shape[0], kernel.shape[1], slide.stride
    rows, cols = slide.outputs(x, kernel)
    x = _pad(x, slide.rows, slide.cols)
    return [
        lax.slice(
            x,
            (0, i, j, 0),
            (x.shape[0], i + (rows - 1) * step + 1, j + (cols - 1) * step + 1, x.shape[3]),
            (1, step, step, 1),
        )
        for i in range(height)
        for j in range(width)
    ]


def shifted(x: jax.Array, kernel: jax.Array, slide: Slide) -> jax.Array:
    """Convolve by one matrix product for each of the kernel's positions, summed."""
    width, channels, features = kernel.shape[1:]
    out = jnp.zeros((), wide(x.dtype))
    for k, part in enumerate(_positions(x, kernel, slide)):
        # Taken by two indices, not of a reshaped kernel: for one channel XLA would lay the gradient
        # out differently in a loop, and then round the optimizer's update differently.
        matrix = kernel[k // width, k % width].astype(x.dtype)
        out = out + _dot(part.reshape(-1, channels), matrix, (1, 0))
    return out.astype(x.dtype).reshape(x.shape[0], *slide.outputs(x, kernel), features)


def _columns(parts: Sequence[jax.Array]) -> jax.Array:
    """Lay parts [B, H', W', C] side by side, as the rows of one matrix."""
    together = parts[0] if len(parts) == 1 else jnp.concatenate(parts, 3)
    return together.reshape(-1, together.shape[3])


def im2col(x: jax.Array, kernel: jax.Array, slide: Slide) -> jax.Array:
    """Convolve by one matrix product, of all that each output sees with the whole kernel."""
    columns = _columns(_positions(x, kernel, slide))
    matrix = kernel.astype(x.dtype).reshape(columns.shape[1], -1)
    out = _dot(columns, matrix, (1, 0)).astype(x.dtype)
    return out.reshape(x.shape[0], *slide.outputs(x, kernel), kernel.shape[3])


def im2col_kernel_gradient(
    x: jax.Array, kernel: jax.Array, grad: jax.Array, slide: Slide
) -> jax.Array:
    """Return the kernel's gradient: one product over all outputs."""
    columns = _columns(_positions(x, kernel, slide))
    sums = _dot(columns, grad.reshape(-1, grad.shape[3]), (0, 0))
    return sums.reshape(kernel.shape).astype(kernel.dtype)


def shifted_kernel_gradient(
    x: jax.Array, kernel: jax.Array, grad: jax.Array, slide: Slide
) -> jax.Array:
    """Return the kernel's gradient: one product for each position."""
    (out,) = jax.linear_transpose(lambda kernel: shifted(x, kernel, slide), kernel)(grad)
    return out


def shifted_input_gradient(
    x: jax.Array, kernel: jax.Array, grad: jax.Array, slide: Slide
) -> jax.Array:
    """Return the input's gradient: one product for each position, added up where it came from."""
    (out,) = jax.linear_transpose(lambda x: shifted(x, kernel, slide), x)(grad)
    return out


# Winograd's F(4, 3): four neighbouring outputs of a filter of three from six products instead of
# twelve, y = OUTPUT @ ((KERNEL @ k) * (INPUT @ x)), exact but for rounding.
# Lavin and Gray 2016, arXiv:1509.09308, section 4.3.
_INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_KERNEL = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


def _mix(matrix: Sequence[Sequence[float]], parts: Sequence[jax.Array], axis: int) -> jax.Array:
    """Multiply ``parts`` by a small matrix, one sum for each of its rows, stacked along ``axis``."""
    sums = []
    for row in matrix:
        terms = [
            p if c == 1 else lax.mul(p.dtype.type(c), p)
            for c, p in zip(row, parts, strict=True)
            if c
        ]
        total = terms[0]
        for term in terms[1:]:
            total = lax.add(total, term)
        sums.append(total)
    return jnp.stack(sums, axis)


def _transpose(matrix: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    return list(zip(*matrix, strict=True))


def _row_tiles(x: jax.Array, before: int, tiles: int) -> jax.Array:
    """Transform six rows for each four rows of outputs: [6, B * tiles * W, C]."""
    x = _pad(x, (before, 4 * tiles + 2 - x.shape[1] - before), (0, 0))
    shape = (x.shape[0], 4 * tiles - 3, *x.shape[2:])
    rows = [
        lax.slice(x, (0, i, 0, 0), (shape[0], i + shape[1], *shape[2:]), (1, 4, 1, 1))
        for i in range(6)
    ]
    return _mix(_INPUT, rows, 0).reshape(6, -1, x.shape[3])


def _by_rows(
    x: jax.Array, taps: jax.Array, over: int, slide: Slide, shape: tuple[int, ...]
) -> jax.Array:
    """Convolve ``x`` to ``shape`` by transformed kernels, contracted over their axis ``over``."""
    batch, columns, (height, width, features) = x.shape[0], x.shape[2], shape[1:]
    tiles = -(-height // 4)
    rows = _row_tiles(x.astype(taps.dtype), slide.rows[0], tiles)
    products = _dot(rows, taps, (2, over), batched=True)
    products = products.reshape(6, batch, tiles, columns, 3, features)
    out = jnp.zeros((), taps.dtype)
    for j in range(3):
        part = _mix(_OUTPUT, [_at(products, (k, None, None, None, j)) for k in range(6)], 2)
        before = slide.cols[0] - j
        part = part.reshape(batch, 4 * tiles, columns, features)
        out = out + _pad(part, (0, height - 4 * tiles), (before, width - columns - before))
    return out.astype(x.dtype)


def _taps(kernel: jax.Array, dtype: Any) -> jax.Array:
    """Transform the rows of a 3 x 3 kernel: [6, 3, C, F]."""
    kernel = kernel.astype(dtype)
    return _mix(_KERNEL, [_at(kernel, (i,)) for i in range(3)], 0)


def winograd(x: jax.Array, kernel: jax.Array, slide: Slide) -> jax.Array:
    """Convolve by a 3 x 3 kernel with stride 1, in half the products of the other forms.

    Rows go through Winograd's F(4, 3); the three columns of the kernel are three outputs of one
    matrix product, added where they belong. Rounding grows to a few times that of a plain sum.
    """
    channels, features = kernel.shape[2:]
    taps = _taps(kernel, wide(x.dtype)).swapaxes(1, 2).reshape(6, channels, 3 * features)
    shape = (x.shape[0], *slide.outputs(x, kernel), features)
    return _by_rows(x, taps, 1, slide, shape)


def winograd_input_gradient(
    x: jax.Array, kernel: jax.Array, grad: jax.Array, slide: Slide
) -> jax.Array:
    """Return the input's gradient: ``grad`` convolved by the kernel turned around."""
    channels, features = kernel.shape[2:]
    taps = _taps(kernel[::-1, ::-1], wide(x.dtype)).reshape(6, 3 * channels, features)
    (top, bottom), (left, right) = slide.rows, slide.cols
    turned = Slide(1, (2 - top, 2 - bottom), (2 - left, 2 - right))
    return _by_rows(grad, taps, 2, turned, x.shape)


def winograd_kernel_gradient(
    x: jax.Array, kernel: jax.Array, grad: jax.Array, slide: Slide
) -> jax.Array:
    """Return the kernel's gradient."""
    sums = wide(x.dtype)
    batch, columns, channels, features = x.shape[0], x.shape[2], x.shape[3], kernel.shape[3]
    tiles = -(-grad.shape[1] // 4)
    shifts = [j - slide.cols[0] for j in range(3)]
    below = (0, 4 * tiles - grad.shape[1])
    # Shifted against the columns of the input that the kernel's three columns meet.
    beside = [_pad(grad.astype(sums), below, (s, columns - grad.shape[2] - s)) for s in shifts]
    rows = jnp.concatenate(beside, 3).reshape(batch, tiles, 4, columns, 3 * features)
    products = _dot(
        _row_tiles(x.astype(sums), slide.rows[0], tiles),
        _mix(_transpose(_OUTPUT), [_at(rows, (None, None, k)) for k in range(4)], 0).reshape(
            6, -1, 3 * features
        ),
        (1, 1),
        batched=True,
    ).reshape(6, channels, 3, features)
    taps = _mix(_transpose(_KERNEL), [_at(products, (k,)) for k in range(6)], 0)  # [3, C, 3, F]
    return taps.swapaxes(1, 2).astype(kernel.dtype)


def xla_input_gradient(x: jax.Array, kernel: jax.Array, grad: jax.Array, slide: Slide) -> Any:
    """Return the input's gradient by XLA's own operation."""
    return jax.vjp(lambda x: xla(x, kernel, slide), x)[1](grad)[0]


def xla_kernel_gradient(x: jax.Array, kernel: jax.Array, grad: jax.Array, slide: Slide) -> Any:
    """Return the kernel's gradient by XLA's own operation."""
    return jax.vjp(lambda kernel: xla(x, kernel, slide), kernel)[1](grad)[0]
