"""Max pooling over windows that do not overlap."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from fnml.models._windows import Windows, windows


def _reduce_window(x: jax.Array, over: Windows) -> jax.Array:
    window = (1, *over, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(x: jax.Array, over: Windows) -> jax.Array:
    def plain(x: jax.Array) -> jax.Array:
        return over.split(x).max((2, 4))

    if not jnp.issubdtype(x.dtype, jnp.floating):
        return plain(x)
    return lax.platform_dependent(x, tpu=lambda x: _reduce_window(x, over), default=plain)


def _forward(x: jax.Array, over: Windows) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    out = _max_pool(x, over)
    return out, (x, out)


def _select_first(x: jax.Array, out: jax.Array, grad: jax.Array, over: Windows) -> jax.Array:
    parts = over.split(x)  # [B, H', h, W', w, C]
    taken = jnp.zeros(out.shape, bool)
    rows = []
    for i in range(over.height):
        cols = []
        for j in range(over.width):
            # "Not less" rather than "equal": a window that holds a NaN passes its gradient on.
            first = ~(parts[:, :, i, :, j] < out) & ~taken
            taken = taken | first
            cols.append(jnp.where(first, grad, jnp.zeros_like(grad)))
        rows.append(jnp.stack(cols, 3))  # [B, H', W', w, C]
    return over.join(jnp.stack(rows, 2), x.shape)


def _backward(
    over: Windows, residuals: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array]:
    def tpu(x: jax.Array, out: jax.Array, grad: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: _reduce_window(x, over), x)[1](grad)[0]

    plain = functools.partial(_select_first, over=over)
    return (lax.platform_dependent(*residuals, grad, tpu=tpu, default=plain),)


_max_pool.defvjp(_forward, _backward)


def max_pool2d(x: jax.Array, window: int | tuple[int, int] = 2) -> jax.Array:
    """Return the maximum of each window of ``x`` [B, H, W, C], as [B, H // h, W // w, C].

    Windows do not overlap; rows and columns that do not fill one are dropped. Where several
    elements share the maximum, the first one in row-major order gets the whole gradient: the
    choice of XLA's select-and-scatter, so gradients equal those of ``lax.reduce_window``. Its
    custom VJP (no forward mode) is several times faster than that on a CPU; a TPU runs that.

    Law: ``max_pool2d(x, w) == lax.reduce_window(x, -inf, lax.max, w, strides=w)``, bitwise, and
    so are the gradients.

    Raises:
      ShapeError: ``x`` is not [B, H, W, C], or smaller than a window.

    >>> import jax.numpy as jnp
    >>> max_pool2d(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    """
    return _max_pool(x, windows("max_pool2d", x, window))
