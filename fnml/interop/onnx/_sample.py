"""Reading an image between its pixels: the interpolation that grids and deformations share."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

# Maps positions on an axis of a given length into it, and tells which count.
Padding = Callable[[Any, int], tuple[Any, Any]]


def zeros(place: Any, size: int) -> tuple[Any, Any]:
    """Count nothing outside."""
    return jnp.clip(place, 0, size - 1), (place >= 0) & (place <= size - 1)


def border(place: Any, size: int) -> tuple[Any, Any]:
    """Repeat the outermost pixel."""
    return jnp.clip(place, 0, size - 1), jnp.ones(place.shape, bool)


def reflection(align_corners: bool) -> Padding:
    """Reflect at the outermost pixels' centres, or at their edges."""
    edge = 0.0 if align_corners else 0.5

    def pad(place: Any, size: int) -> tuple[Any, Any]:
        low, span = -edge, size - 1 + 2 * edge
        if span == 0:
            return jnp.zeros_like(place), jnp.ones(place.shape, bool)
        way = jnp.abs(place - low) % (2 * span)
        inside = low + jnp.where(way > span, 2 * span - way, way)
        return jnp.clip(inside, 0, size - 1), jnp.ones(place.shape, bool)

    return pad


def cubic_weights(t: Any, a: float = -0.75) -> list[Any]:
    """Return the weights of the four neighbours of a point ``t`` past the second of them."""

    def near(d: Any) -> Any:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: Any) -> Any:
        return ((d - 5) * d + 8) * d * a - 4 * a

    return [far(t + 1), near(t), near(1 - t), far(2 - t)]


def _axis_taps(place: Any, size: int, mode: str, pad: Padding) -> list[tuple[Any, Any]]:
    """Return ``(index, weight)`` of every neighbour along one axis."""
    if mode == "nearest":
        # Rounds before padding, half to even.
        inside, counts = pad(jnp.round(place), size)
        return [(inside.astype(jnp.int32), counts.astype(place.dtype))]
    first = jnp.floor(place)
    t = place - first
    steps: tuple[int, ...]
    if mode == "linear":
        steps, weights = (0, 1), [1 - t, t]
    else:
        steps, weights = (-1, 0, 1, 2), cubic_weights(t)
    taps = []
    for step, weight in zip(steps, weights, strict=True):
        inside, counts = pad(first + step, size)
        taps.append((inside.astype(jnp.int32), jnp.where(counts, weight, 0)))
    return taps


def sample(image: Any, places: Sequence[Any], mode: str, pad: Padding) -> Any:
    """Interpolate an image at points.

    Args:
      image: ``[C, *S]``.
      places: for each spatial axis, positions in pixels, all of one shape ``P``.
      mode: ``nearest``, ``linear`` or ``cubic``.
      pad: what lies outside.

    Returns:
      ``[C, *P]``.
    """
    axes = [_axis_taps(p, size, mode, pad) for p, size in zip(places, image.shape[1:], strict=True)]
    total = None
    for taps in itertools.product(*axes):
        values = image[(slice(None), *(index for index, _ in taps))]
        weight = taps[0][1]
        for _, along in taps[1:]:
            weight = weight * along
        # A neighbour of no weight may be infinite or NaN.
        term = jnp.where(
            weight[None] == 0,
            jnp.zeros((), values.dtype),
            values * weight[None].astype(values.dtype),
        )
        total = term if total is None else total + term
    return total
