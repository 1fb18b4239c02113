"""What a quantised matrix is made of, and how its codes become numbers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Packed(NamedTuple):
    """A quantised matrix [in, out].

    Attributes:
      codes: int8 or uint8 [in, out]; for 4 bits uint8 [ceil(in / 2), out], the first half of the
        rows in the low, the second in the high nibbles.
      scale: floats [groups, out]; a group is in / groups consecutive rows.
      zero: uint8 [groups, out], the code of 0; ``None`` for a symmetric grid, whose 4-bit codes are
        stored with 8 added.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None


class Layout(NamedTuple):
    """The sizes of a quantised matrix, static.

    Attributes:
      bits: 8 or 4.
      rows: the rows of the matrix, in.
      group: the rows that share a scale.
    """

    bits: int
    rows: int
    group: int

    @property
    def part(self) -> int:
        """The rows of the codes: all, or half of them rounded up."""
        return self.rows if self.bits == 8 else -(-self.rows // 2)

    @property
    def parts(self) -> int:
        """How many rows of the matrix a row of codes holds."""
        return 1 if self.bits == 8 else 2


def unpack(codes: jax.Array, part: int, bits: int, symmetric: bool) -> jax.Array:
    """Return the int32 codes of one part, symmetric ones around 0."""
    whole = codes.astype(jnp.int32)
    if bits == 8:
        return whole
    nibble = whole & 15 if part == 0 else whole >> 4
    return nibble - 8 if symmetric else nibble


def numbers(
    packed: Packed, layout: Layout, codes: jax.Array, part: int, start: jax.Array
) -> jax.Array:
    """Return float32 numbers [R, out] of the ``codes`` at rows ``start`` ... of a part."""
    rows, group = codes.shape[0], layout.group
    whole = unpack(codes, part, layout.bits, packed.zero is None)
    offset = part * layout.part
    fits = rows % group == 0 or group % rows == 0
    # Without a remainder: the row that pads an odd number has no group of its own.
    aligned = offset % group == 0 and fits and layout.parts * layout.part == layout.rows
    if aligned:
        first = lax.div(start + offset, group)
        whole = whole.reshape(max(rows // group, 1), min(rows, group), -1)

        def grid(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, first, whole.shape[0], 0)[:, None]
    else:
        # Groups that begin inside of a part: each row looks up its own, a padding row any.
        index = lax.div(start + offset + jnp.arange(rows), group)

        def grid(x: jax.Array) -> jax.Array:
            return jnp.take(x, index, axis=0, mode="clip")

    if packed.zero is not None:
        whole = whole - grid(packed.zero).astype(jnp.int32)
    return (whole.astype(jnp.float32) * grid(packed.scale).astype(jnp.float32)).reshape(rows, -1)


def dequantize(packed: Packed, layout: Layout) -> jax.Array:
    """Return the float32 matrix [in, out]."""
    parts = [
        numbers(packed, layout, packed.codes, part, jnp.int32(0)) for part in range(layout.parts)
    ]
    return jnp.concatenate(parts, axis=0)[: layout.rows]
