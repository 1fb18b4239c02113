"""What decode attention reads."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Operands(NamedTuple):
    """The arrays of one call.

    Attributes:
      q: floats [B, t, H, D].
      k: the cached keys [B, S, K, D], or [P, page, K, D] with a table; floats or int8.
      v: the cached values, like ``k``.
      lengths: int32 [B], the tokens of each sequence, its last t are those of ``q``.
      page_table: int32 [B, pages], or ``None``.
      k_scale: float32 [B, K, S] or [P, K, page]; ``None`` for keys that are floats.
      v_scale: like ``k_scale``, of the values.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    lengths: jax.Array
    page_table: jax.Array | None = None
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None

    @property
    def length(self) -> int:
        """The most tokens that a sequence may have, S."""
        if self.page_table is None:
            return int(self.k.shape[1])
        return int(self.page_table.shape[1] * self.k.shape[1])


class Options(NamedTuple):
    """The settings of one call: how far back a query sees, and the bound of its scores."""

    window: int | None = None
    soft_cap: float | None = None


def in_order(operands: Operands) -> Operands:
    """Copy pages into whole caches [B, S, K, D]; the scales become [B, K, S]."""
    table = operands.page_table
    if table is None:
        return operands

    def whole(pages: jax.Array, time: int) -> jax.Array:
        # A page number may be anything where a sequence has no page: such a page is not seen.
        parts = jnp.take(pages, table, axis=0, mode="clip")  # [B, pages, ...]
        parts = jnp.moveaxis(parts, 1, time)  # pages stand before the time inside of a page
        size = parts.shape
        return parts.reshape(*size[:time], size[time] * size[time + 1], *size[time + 2 :])

    return operands._replace(
        k=whole(operands.k, 1),
        v=whole(operands.v, 1),
        page_table=None,
        k_scale=None if operands.k_scale is None else whole(operands.k_scale, 2),
        v_scale=None if operands.v_scale is None else whole(operands.v_scale, 2),
    )
