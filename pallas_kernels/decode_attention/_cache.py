"""Write into a cache of keys and values, whole or in pages, as floats or as bytes."""

import jax
import jax.numpy as jnp
from jax import lax

from fnml.pallas_kernels._implementation import refuse


def quantize_cache(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Round keys or values [B, t, K, D] to int8 codes and float32 scales [B, K, t].

    Each token of each head has its scale ``max|x| / 127``, so that a token can be added without
    touching the others; the scales' last axis is time, as kernels read them.

    Law: ``|codes * scale - x| <= scale / 2``, and zeros stay zeros.

    >>> import jax.numpy as jnp
    >>> codes, scale = quantize_cache(jnp.array([1.0, -0.5]).reshape(1, 1, 1, 2))
    >>> codes.tolist(), scale.shape
    ([[[[127, -64]]]], (1, 1, 1))
    """
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / 127
    codes = jnp.round(wide / jnp.where(scale == 0, 1.0, scale)).astype(jnp.int8)
    return codes, jnp.swapaxes(scale[..., 0], 1, 2)


def cache_update(
    cache: jax.Array, new: jax.Array, position: jax.Array, *, axis: int = 1
) -> jax.Array:
    """Write ``new`` [B, t, ...] at ``position`` [B] of each sequence's cache [B, S, ...].

    ``axis`` says where time is: 1 in keys and values, 2 in the scales of :func:`quantize_cache`.
    As with :func:`jax.lax.dynamic_update_slice`, what would reach beyond S is moved back.

    >>> import jax.numpy as jnp
    >>> cache_update(jnp.zeros((2, 3)), jnp.ones((2, 1)), jnp.array([0, 2])).tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """

    def one(cache: jax.Array, new: jax.Array, position: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(cache, new, position, axis - 1)

    return jax.vmap(one)(cache, new.astype(cache.dtype), position)


def paged_update(
    pages: jax.Array, new: jax.Array, page_table: jax.Array, position: jax.Array, *, axis: int = 1
) -> jax.Array:
    """Write ``new`` [B, t, ...] at ``position`` [B] of sequences kept in pages [P, page, ...].

    Token i of sequence b lies in page ``page_table[b, i // page]`` at ``i % page``; several
    sequences may share pages of a common beginning, which nobody writes to. What lies beyond the
    table is dropped, and so is a token whose page number is negative. ``axis`` as in
    :func:`cache_update`: 2 for scales [P, K, page] and [B, K, t].

    Raises:
      ValueError: the shapes do not fit together.

    >>> import jax.numpy as jnp
    >>> table = jnp.array([[2, 0]])
    >>> paged_update(jnp.zeros((3, 2)), jnp.ones((1, 2)), table, jnp.array([1])).tolist()
    [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]
    """
    page, t = pages.shape[axis], new.shape[axis]
    table_fits = page_table.ndim == 2 and page_table.shape[0] == new.shape[0]
    if not table_fits or position.shape != new.shape[:1] or pages.ndim != new.ndim:
        got = f"{pages.shape}, {new.shape}, {page_table.shape} and {position.shape}"
        expected = "[P, page, ...], [B, t, ...], [B, pages] and [B]"
        refuse(
            "paged_update", [f"pages, new, page_table and position are {got}, expected {expected}"]
        )
    at = position[:, None].astype(jnp.int32) + jnp.arange(t, dtype=jnp.int32)[None, :]  # [B, t]
    index = lax.div(at, jnp.int32(page))
    number = jnp.take_along_axis(page_table.astype(jnp.int32), index, axis=1, mode="clip")
    # One past the last page is nowhere: the scatter drops it.
    number = jnp.where((index < page_table.shape[1]) & (number >= 0), number, pages.shape[0])
    slot = lax.rem(at, jnp.int32(page))
    new = jnp.moveaxis(new, axis, 1).astype(pages.dtype)
    where = (number, slot) if axis == 1 else (number, slice(None), slot)
    return pages.at[where].set(new, mode="drop")
