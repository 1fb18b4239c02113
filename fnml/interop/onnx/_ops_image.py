"""Images read at computed places: GridSample and AffineGrid."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnml.core import ConfigError
from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._sample import Padding, border, reflection, sample, zeros
from fnml.interop.onnx._static import checked, static_ints, traced, where_is

_MODES = {"bilinear": "linear", "bicubic": "cubic"}


def _reflected(place: Any, size: int, pad: Padding, mode: str) -> Any:
    """Bring a point inside before its neighbours are looked up, unless these are four."""
    return place if mode == "cubic" or pad is zeros else pad(place, size)[0]


def _grid_sample(node: Node, x: Any, grid: Any) -> Any:
    x, grid = traced(node, x, grid)
    get = node.attributes.get
    mode = _MODES.get(get("mode", "linear"), get("mode", "linear"))
    corners = bool(get("align_corners", 0))
    paddings: Mapping[str, Padding] = {
        "zeros": zeros,
        "border": border,
        "reflection": reflection(corners),
    }
    if mode not in ("nearest", "linear", "cubic") or get("padding_mode", "zeros") not in paddings:
        raise ConfigError(
            f"{where_is(node)}: mode {mode!r} with padding_mode {get('padding_mode')!r}; there are "
            f"nearest, linear and cubic, with {', '.join(paddings)}"
        )
    pad = paddings[get("padding_mode", "zeros")]
    if grid.dtype != jnp.float64:
        grid = grid.astype(jnp.float32)
    places = []
    # A grid's last axis runs from the innermost spatial axis outwards.
    for size, along in zip(x.shape[2:], jnp.moveaxis(grid, -1, 0)[::-1], strict=True):
        place = (along + 1) / 2 * (size - 1) if corners else ((along + 1) * size - 1) / 2
        places.append(_reflected(place, size, pad, mode))
    out = jax.vmap(lambda image, *p: sample(image, p, mode, pad))(x, *places)
    return out.astype(x.dtype)


def _affine_grid(node: Node, theta: Any, size: Any) -> Any:
    spatial = checked(node, static_ints(node, 1, size))[2:]
    (theta,) = traced(node, theta)
    axes = []
    for n in spatial:
        if node.attributes.get("align_corners", 0):
            axes.append(np.linspace(-1, 1, n) if n > 1 else np.zeros(1))
        else:
            axes.append((2 * np.arange(n) + 1) / n - 1)
    mesh = np.meshgrid(*axes, indexing="ij")[::-1]
    points = jnp.asarray(np.stack([*mesh, np.ones(spatial)], axis=-1).astype(theta.dtype))
    precise = jax.lax.Precision.HIGHEST
    return jnp.einsum("...j,bij->b...i", points, theta, precision=precise)


OPERATORS: Mapping[str, Operator] = {
    "AffineGrid": _affine_grid,
    "GridSample": _grid_sample,
}

SHAPE_INPUTS: Mapping[str, tuple[int, ...]] = {"AffineGrid": (1,)}
