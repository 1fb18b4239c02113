"""Rotary position embedding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnml.core import ShapeError


class Rotation(NamedTuple):
    """The cosines and sines of a rotation, float32 [..., T, D / 2]."""

    cos: jax.Array
    sin: jax.Array


def rotation(positions: jax.Array | np.ndarray, width: int, *, base: float = 10_000.0) -> Rotation:
    """Return the rotation of heads of ``width`` D at ``positions`` [T] or [B, T].

    Pair i of D / 2 turns by ``position * base ** (-2 * i / D)``. All layers share one rotation.
    NumPy's positions make it a constant of the program, with the same bits; what is computed in the
    program XLA fuses into every use on a CPU, and takes the cosines of each head anew.

    Raises:
      ShapeError: ``width`` is odd.

    >>> import jax.numpy as jnp
    >>> rotation(jnp.arange(5), 8).cos.shape
    (5, 4)
    """
    if width % 2:
        raise ShapeError(f"a rotary embedding got heads of width {width}: expected an even width")
    if isinstance(positions, np.ndarray):
        with jax.ensure_compile_time_eval():
            return rotation(jnp.asarray(positions, jnp.int32), width, base=base)
    frequencies = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = jnp.expand_dims(positions.astype(jnp.float32), -1) * frequencies.reshape(
        (1,) * positions.ndim + (-1,)
    )
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotate ``x`` [B, T, H, D] by a rotation of [T] or [B, T] positions, in the dtype of ``x``.

    Element i is paired with element i + D / 2 (the order of GPT-NeoX and Llama checkpoints).

    Raises:
      ShapeError: the rotation is for other positions or another width.
    """
    *_, length, _, width = x.shape
    if by.cos.shape[-2:] != (length, width // 2):
        raise ShapeError(
            f"rotate got x {x.shape} and a rotation {by.cos.shape}: expected [..., T, D / 2], "
            f"here [..., {length}, {width // 2}]"
        )
    cos, sin = (jnp.expand_dims(t.astype(x.dtype), -2) for t in by)  # [..., T, 1, D / 2]
    if cos.ndim < x.ndim:
        cos, sin = jnp.expand_dims(cos, 0), jnp.expand_dims(sin, 0)
    low, high = x[..., : width // 2], x[..., width // 2 :]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1)


def rope(x: jax.Array, positions: jax.Array, *, base: float = 10_000.0) -> jax.Array:
    """Rotate the heads of ``x`` [B, T, H, D] by their ``positions``, int [T] or [B, T].

    Angles are float32, the output has the dtype of ``x``.

    Law: ``rope(q, m) . rope(k, n)`` depends on ``m - n`` only, to rounding; norms are kept.

    Source: Su et al. 2021, arXiv:2104.09864, equation 34, with the halves of a head paired.

    Raises:
      ShapeError: D is odd, or the positions do not fit T.

    >>> import jax.numpy as jnp
    >>> rope(jnp.ones((2, 5, 3, 8)), jnp.arange(5)).shape
    (2, 5, 3, 8)
    """
    return rotate(x, rotation(positions, x.shape[-1], base=base))
