"""Moving blocks of images: Col2Im, DepthToSpace, SpaceToDepth, CenterCropPad, MaxUnpool."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._static import axis_of, checked, static_ints, traced


def _depth_to_space(node: Node, x: Any) -> Any:
    b, c, h, w = x.shape
    n = node.attributes["blocksize"]
    if node.attributes.get("mode", "DCR") == "DCR":
        blocks = x.reshape(b, n, n, c // n**2, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        blocks = x.reshape(b, c // n**2, n, n, h, w).transpose(0, 1, 4, 2, 5, 3)
    return blocks.reshape(b, c // n**2, h * n, w * n)


def _space_to_depth(node: Node, x: Any) -> Any:
    b, c, h, w = x.shape
    n = node.attributes["blocksize"]
    blocks = x.reshape(b, c, h // n, n, w // n, n)
    order = (
        (0, 3, 5, 1, 2, 4) if node.attributes.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    )
    return blocks.transpose(order).reshape(b, c * n**2, h // n, w // n)


def _center_crop_pad(node: Node, x: Any, shape: Any) -> Any:
    sizes = checked(node, static_ints(node, 1, shape))
    (x,) = traced(node, x)
    axes = node.attributes.get("axes") or range(x.ndim)
    edges = [(0, 0, 0)] * x.ndim
    for axis, size in zip(axes, sizes, strict=True):
        axis = axis_of(node, axis, x.ndim)
        extra = size - x.shape[axis]
        # Towards zero: an odd pixel is cut or padded at the end, a crop starts rounded down.
        before = extra // 2 if extra >= 0 else -(-extra // 2)
        edges[axis] = (before, extra - before, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), edges)


def _col2im(node: Node, x: Any, image_shape: Any, block_shape: Any) -> Any:
    image = checked(node, static_ints(node, 1, image_shape))
    block = checked(node, static_ints(node, 2, block_shape))
    (x,) = traced(node, x)
    rank = len(image)
    get = node.attributes.get
    strides, dilations = get("strides") or [1] * rank, get("dilations") or [1] * rank
    pads = get("pads") or [0] * (2 * rank)
    padded = [n + a + b for n, a, b in zip(image, pads[:rank], pads[rank:], strict=True)]
    # places: where element e of block l lies in the padded image, flat, [prod(block), L].
    places = np.zeros((1, 1), np.int64)
    for n, k, stride, dilation in zip(padded, block, strides, dilations, strict=True):
        starts = np.arange(0, n - (k - 1) * dilation, stride)
        along = np.arange(k)[:, None] * dilation + starts
        places = (places[:, None, :, None] * n + along[None, :, None, :]).reshape(
            places.shape[0] * k, places.shape[1] * len(starts)
        )
    batch, columns = x.shape[0], x.shape[1] // places.shape[0]
    values = x.reshape(batch, columns, *places.shape)
    out = jnp.zeros((batch, columns, int(np.prod(padded))), x.dtype).at[:, :, places].add(values)
    window = [slice(a, a + n) for a, n in zip(pads, image, strict=False)]
    return out.reshape(batch, columns, *padded)[(slice(None), slice(None), *window)]


def _max_unpool(node: Node, x: Any, indices: Any, output_shape: Any = None) -> Any:
    shape = None if output_shape is None else static_ints(node, 2, output_shape)
    x, indices = traced(node, x, indices)
    rank = x.ndim - 2
    get = node.attributes.get
    strides, pads = get("strides") or [1] * rank, get("pads") or [0] * (2 * rank)
    natural = [
        (n - 1) * s + k - a - b
        for n, s, k, a, b in zip(
            x.shape[2:],
            strides,
            node.attributes["kernel_shape"],
            pads[:rank],
            pads[rank:],
            strict=True,
        )
    ]
    # MaxPool counted in the shape it was given, which is the output's, as for onnxruntime and
    # PyTorch; the suite has one case that counts in the natural shape and pads.
    shape = checked(node, shape or (*x.shape[:2], *natural))
    flat = jnp.zeros(int(np.prod(shape)), x.dtype).at[indices.reshape(-1)].set(x.reshape(-1))
    return flat.reshape(shape)


OPERATORS: Mapping[str, Operator] = {
    "CenterCropPad": _center_crop_pad,
    "Col2Im": _col2im,
    "DepthToSpace": _depth_to_space,
    "MaxUnpool": _max_unpool,
    "SpaceToDepth": _space_to_depth,
}

SHAPE_INPUTS: Mapping[str, tuple[int, ...]] = {
    "CenterCropPad": (1,),
    "Col2Im": (1, 2),
    "MaxUnpool": (2,),
}
