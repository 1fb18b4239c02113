"""Rotary position embedding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnml.core import ShapeError
from fnml.models._native import native_takes
from fnml.pallas_kernels.native import call, on_cpu


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
        # One program for all of it: what is traced around takes no part.
        positions = positions.astype(np.int32)
        lowered = jax.jit(_rotation, static_argnums=(1, 2)).lower(positions, width, base)
        return Rotation(*lowered.compile()(positions))
    return _rotation(positions, width, base)


def _rotation(positions: jax.Array, width: int, base: float) -> Rotation:
    frequencies = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = jnp.expand_dims(positions.astype(jnp.float32), -1) * frequencies.reshape(
        (1,) * positions.ndim + (-1,)
    )
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def _plain(x: jax.Array, by: Rotation) -> jax.Array:
    half = x.shape[-1] // 2
    cos, sin = (jnp.expand_dims(t.astype(x.dtype), -2) for t in by)  # [..., T, 1, D / 2]
    if cos.ndim < x.ndim:
        cos, sin = jnp.expand_dims(cos, 0), jnp.expand_dims(sin, 0)
    low, high = x[..., :half], x[..., half:]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1)


def _turn(x: jax.Array, by: Rotation, back: bool) -> jax.Array:
    """Rotate x [B, T, H, D], or rotate it back, which is also the derivative."""

    def native(x: jax.Array, by: Rotation) -> jax.Array:
        angles = (t.reshape(-1, *t.shape[-2:]) for t in by)  # [B or 1, T, D / 2]
        return call("fnml_rotate", jax.typeof(x), x, *angles, back=np.int64(back))

    def plain(x: jax.Array, by: Rotation) -> jax.Array:
        return _plain(x, Rotation(by.cos, -by.sin) if back else by)

    return on_cpu(native, plain, x, by)


@jax.custom_vjp
def _native(x: jax.Array, by: Rotation) -> jax.Array:
    return _turn(x, by, back=False)


def _forward(x: jax.Array, by: Rotation) -> tuple[jax.Array, tuple[jax.Array, Rotation]]:
    return _native(x, by), (x, by)


def _backward(saved: tuple[jax.Array, Rotation], grad: jax.Array) -> tuple[jax.Array, Rotation]:
    x, by = saved
    # Angles that are constants need no gradient: the compiler drops it, and x with it.
    _, vjp = jax.vjp(lambda by: _plain(x, by), by)
    return _turn(grad, by, back=True), *vjp(grad)


_native.defvjp(_forward, _backward)


def _in_cpp(x: jax.Array, by: Rotation) -> bool:
    """Tell whether C++ takes x [B, T, H, D] and a rotation of [T], [1, T] or [B, T] positions."""
    batches = ((), (1,), x.shape[:1])
    return x.ndim == 4 and by.cos.shape[:-2] in batches and native_takes(x) and native_takes(*by)


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotate ``x`` [B, T, H, D] by a rotation of [T] or [B, T] positions, in the dtype of ``x``.

    Element i is paired with element i + D / 2 (the order of GPT-NeoX and Llama checkpoints). Within
    :func:`fnml.pallas_kernels.native_kernels` it runs in C++ on a CPU, with a custom VJP: there is
    no forward mode (``jax.jvp``) then.

    Raises:
      ShapeError: D is odd, or the rotation is for other positions or another width.
    """
    *_, length, _, width = x.shape
    if width % 2 or by.cos.shape[-2:] != (length, width // 2):
        raise ShapeError(
            f"rotate got x {x.shape} and a rotation {by.cos.shape}: expected [..., T, D / 2], "
            f"here [..., {length}, {width // 2}]"
        )
    return (_native if _in_cpp(x, by) else _plain)(x, by)


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
