"""Write convolutions of every kind: strided, dilated, transposed, grouped, and their gradients."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fnml.interop.onnx._builder import Builder, Lowering, Refused
from fnml.interop.onnx._lower_shape import flip, pad, shape_of
from fnml.interop.onnx._shapes import all_static
from fnml.interop.onnx._support import widest, zero

_BYTES = (np.dtype(np.int8), np.dtype(np.uint8))


class _Window(NamedTuple):
    """What a convolution does along its spatial axes, and in how many groups of channels."""

    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    holes: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: int


def _conv(g: Builder, eqn: Any, x: str, w: str) -> str:
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    result = np.dtype(eqn.outvars[0].aval.dtype)
    x_shape = [shape_of(eqn.invars[0])[i] for i in numbers.lhs_spec]
    w_shape = [shape_of(eqn.invars[1])[i] for i in numbers.rhs_spec]
    if not all_static(w_shape, *params["padding"]):
        raise Refused("with a kernel or a padding of symbolic size")
    x, w = g.transpose(x, numbers.lhs_spec), g.transpose(w, numbers.rhs_spec)
    window = _Window(
        tuple(params["window_strides"]),
        tuple((int(low), int(high)) for low, high in params["padding"]),
        tuple(params["lhs_dilation"]),
        tuple(params["rhs_dilation"]),
        int(params["feature_group_count"]),
    )
    batches = int(params["batch_group_count"])
    if batches > 1:
        x, x_shape = _batches_to_channels(g, x, x_shape, batches)
        window = window._replace(groups=batches)
    flat = not window.strides
    if flat:
        # ONNX wants at least one spatial axis.
        x, x_shape = g("Unsqueeze", x, g.axes(2)), [*x_shape, 1]
        w, w_shape = g("Unsqueeze", w, g.axes(2)), [*w_shape, 1]
        window = window._replace(strides=(1,), pads=((0, 0),), holes=(1,), dilations=(1,))
    out = _convolved(g, x, x_shape, w, w_shape, window, result)
    if flat:
        out = g("Squeeze", out, g.axes(2))
    return g.transpose(out, np.argsort(numbers.out_spec).tolist())


def _batches_to_channels(
    g: Builder, x: str, shape: list[Any], batches: int
) -> tuple[str, list[Any]]:
    """Turn groups of examples into groups of channels: [G B, C, ...] to [B, G C, ...]."""
    each = shape[0] // batches
    split = [batches, each, *shape[1:]]
    x = g.transpose(g.reshape(x, shape, split), [1, 0, *range(2, len(split))])
    joined = [each, batches * shape[1], *shape[2:]]
    return g.reshape(x, [each, batches, *shape[1:]], joined), joined


def _convolved(
    g: Builder,
    x: str,
    x_shape: list[Any],
    w: str,
    w_shape: list[Any],
    window: _Window,
    result: np.dtype[Any],
) -> str:
    """Convolve x [B, C, ...] with w [O, C / groups, ...]."""
    own = (g.dtypes[x], g.dtypes[w])
    if own[0] in _BYTES and own[1] in _BYTES and result == np.int32:
        x, window = _plain(g, x, x_shape, window)
        return g("ConvInteger", x, w, dtype=result, **_attributes(w_shape, window))
    if not jnp.issubdtype(result, jnp.floating):
        raise Refused(f"of {own[0]} and {own[1]} to {result}: ONNX has int8 to int32")
    dtype = widest(*own, result)
    x, w = g.cast(x, dtype), g.cast(w, dtype)
    if _is_transposed(w_shape, window):
        return g.cast(_transposed(g, x, w, w_shape, window), result)
    x, window = _plain(g, x, x_shape, window)
    return g.cast(g("Conv", x, w, **_attributes(w_shape, window)), result)


def _plain(g: Builder, x: str, shape: Sequence[Any], window: _Window) -> tuple[str, _Window]:
    """Do what Conv has no attribute for beforehand: holes between elements, negative padding."""
    cut = any(low < 0 or high < 0 for low, high in window.pads)
    if all(hole == 1 for hole in window.holes) and not cut:
        return x, window
    places = zip(window.pads, window.holes, strict=True)
    config = [(0, 0, 0), (0, 0, 0), *((low, high, hole - 1) for (low, high), hole in places)]
    x = pad(g, x, shape, zero(g.dtypes[x]), config)
    none = tuple((0, 0) for _ in window.pads)
    return x, window._replace(pads=none, holes=(1,) * len(none))


def _attributes(w_shape: Sequence[Any], window: _Window) -> dict[str, Any]:
    lows, highs = zip(*window.pads, strict=True)
    return {
        "kernel_shape": [int(d) for d in w_shape[2:]],
        "strides": list(window.strides),
        "dilations": list(window.dilations),
        "pads": [*lows, *highs],
        "group": window.groups,
    }


def _reach(w_shape: Sequence[Any], window: _Window) -> list[int]:
    """Return how far the kernel reaches along each axis, less one."""
    return [(int(k) - 1) * d for k, d in zip(w_shape[2:], window.dilations, strict=True)]


def _is_transposed(w_shape: Sequence[Any], window: _Window) -> bool:
    """Tell whether this is a transposed convolution that ConvTranspose can say."""
    if all(hole == 1 for hole in window.holes) or any(s != 1 for s in window.strides):
        return False
    reach = _reach(w_shape, window)
    return all(max(pads) <= r for pads, r in zip(window.pads, reach, strict=True))


def _transposed(g: Builder, x: str, w: str, w_shape: Sequence[Any], window: _Window) -> str:
    reach = _reach(w_shape, window)
    features, channels, *rest = (int(d) for d in w_shape)
    groups = window.groups
    # [G O, C, ...] to [G C, O, ...], mirrored.
    split = [groups, features // groups, channels, *rest]
    w = g.reshape(w, w_shape, split)
    w = g.transpose(w, [0, 2, 1, *range(3, len(split))])
    swapped = [groups, channels, features // groups, *rest]
    w = g.reshape(w, swapped, [groups * channels, features // groups, *rest])
    w = flip(g, w, range(2, 2 + len(rest)))
    pads = [[r - p[side] for r, p in zip(reach, window.pads, strict=True)] for side in (0, 1)]
    return g(
        "ConvTranspose",
        x,
        w,
        kernel_shape=rest,
        strides=list(window.holes),
        dilations=list(window.dilations),
        pads=[*pads[0], *pads[1]],
        group=groups,
    )


LOWERINGS: Mapping[str, Lowering] = {"conv_general_dilated": _conv}
