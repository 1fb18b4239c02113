"""Spectra and windows: DFT, STFT, MelWeightMatrix, and the three cosine windows."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from fnml.interop.onnx._dtypes import DTYPES
from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._static import axis_of, checked, static, static_ints, traced


def _as_complex(x: Any) -> Any:
    """Join a last axis of real, or real and imaginary parts; half precision becomes float32."""
    if x.dtype != jnp.float64:
        x = x.astype(jnp.float32)
    return x[..., 0] if x.shape[-1] == 1 else lax.complex(x[..., 0], x[..., 1])


def _as_parts(z: Any, dtype: Any) -> Any:
    """Split into a last axis of real and imaginary parts."""
    return jnp.stack([z.real, z.imag], axis=-1).astype(dtype)


def _forward(z: Any, size: int, axis: int, onesided: bool) -> Any:
    """Transform; a real signal by its half spectrum, whose ends then are exactly real."""
    if jnp.iscomplexobj(z):
        return jnp.fft.fft(z, n=size, axis=axis)
    half = jnp.fft.rfft(z, n=size, axis=axis)
    if onesided:
        return half
    rest = lax.slice_in_dim(half, 1, (size + 1) // 2, axis=axis)
    return jnp.concatenate([half, jnp.flip(rest.conj(), axis)], axis=axis)


def _dft(node: Node, x: Any, length: Any = None, axis: Any = None) -> Any:
    get = node.attributes.get
    if node.version < 20:
        place = get("axis", 1)
    else:
        (place,) = (-2,) if axis is None else static_ints(node, 2, axis)
    place = axis_of(node, place, x.ndim)
    size = None if length is None else checked(node, static_ints(node, 1, length))[0]
    (x,) = traced(node, x)
    z = _as_complex(x)
    if get("inverse", 0) and get("onesided", 0):
        return jnp.fft.irfft(z, n=size, axis=place)[..., None].astype(x.dtype)
    if get("inverse", 0):
        out = jnp.fft.ifft(z, n=size, axis=place)
    else:
        out = _forward(z, size or x.shape[place], place, bool(get("onesided", 0)))
    return _as_parts(out, x.dtype)


def _stft(node: Node, x: Any, step: Any, window: Any = None, length: Any = None) -> Any:
    (stride,) = static_ints(node, 1, step)
    if length is not None:
        (size,) = checked(node, static_ints(node, 3, length))
    else:
        size = x.shape[1] if window is None else window.shape[0]
    x, window = traced(node, x, window)
    starts = np.arange(0, x.shape[1] - size + 1, stride)
    frames = _as_complex(x)[:, starts[:, None] + np.arange(size)]
    if window is not None:
        frames = frames * window.astype(frames.real.dtype)[None, None].astype(frames.dtype)
    onesided = bool(node.attributes.get("onesided", 1))
    return _as_parts(_forward(frames, size, frames.ndim - 1, onesided), x.dtype)


def _mel_weight_matrix(
    node: Node, bands: Any, length: Any, rate: Any, lowest: Any, highest: Any
) -> np.ndarray:
    (count,), (size,), (samples,) = (
        static_ints(node, i, v) for i, v in enumerate((bands, length, rate))
    )
    checked(node, (size // 2 + 1, count + 2))
    edges = [float(static(node, i, v).ravel()[0]) for i, v in ((3, lowest), (4, highest))]
    low, high = (2595 * np.log10(1 + f / 700) for f in edges)
    # The scale is cut in as many steps as it has marks, so the last mark lies below the end.
    mels = low + np.arange(count + 2) * (high - low) / (count + 2)
    hertz = 700 * (10 ** (mels / 2595) - 1)
    marks = ((size + 1) * hertz) // samples
    left, peak, right = marks[:-2], marks[1:-1], marks[2:]
    line = np.arange(size // 2 + 1, dtype=np.float64)[:, None]
    rise = np.where(peak > left, (line - left) / np.maximum(peak - left, 1), line == peak)
    fall = np.where(right > peak, (right - line) / np.maximum(right - peak, 1), 1)
    weights = np.where(line <= peak, rise, 0)
    weights = np.where((line >= peak) & (line < right), fall, weights)
    weights = np.where(line < left, 0, weights)
    return weights.astype(DTYPES[node.attributes.get("output_datatype", 1)])


def _window(*coefficients: float) -> Operator:
    """Make the operator of a sum of cosines with alternating signs."""

    def operator(node: Node, size: Any) -> np.ndarray:
        (count,) = checked(node, static_ints(node, 0, size))
        periodic = node.attributes.get("periodic", 1)
        angle = 2 * np.pi * np.arange(count) / max(count if periodic else count - 1, 1)
        terms = [(-1) ** k * c * np.cos(k * angle) for k, c in enumerate(coefficients)]
        return np.sum(terms, axis=0).astype(DTYPES[node.attributes.get("output_datatype", 1)])

    return operator


OPERATORS: Mapping[str, Operator] = {
    "BlackmanWindow": _window(0.42, 0.5, 0.08),
    "DFT": _dft,
    "HammingWindow": _window(25 / 46, 21 / 46),
    "HannWindow": _window(0.5, 0.5),
    "MelWeightMatrix": _mel_weight_matrix,
    "STFT": _stft,
}

SHAPE_INPUTS: Mapping[str, tuple[int, ...]] = {
    "BlackmanWindow": (0,),
    "DFT": (1, 2),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "MelWeightMatrix": (0, 1, 2, 3, 4),
    "STFT": (1, 3),
}
