"""Layers' weights of which a file says only their shape and the one value of all."""

import math
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def weight_names(nodes: Iterable[Any]) -> frozenset[str]:
    """Return the names of values that layers take as their kernels, in one graph."""
    return frozenset(
        node.input[1]
        for node in nodes
        if node.op_type in _LAYERS and node.domain in ("", "ai.onnx") and len(node.input) > 1
    )


def filled_weights(
    proto: Any,
    domain: str,
    attributes: Mapping[str, Any],
    constants: Mapping[str, np.ndarray],
    weights: AbstractSet[str],
    most: int,
) -> np.ndarray | None:
    """Return a layer's weights where the file only says their shape and the one value of all.

    As a constant of one value, jax 0.10.2 convolves with them wrongly on a CPU. Weights of more than
    ``most`` numbers stay one, which takes no memory before it is used.
    """
    if (proto.op_type, domain) != ("ConstantOfShape", "") or len(proto.input) != 1:
        return None
    shape, fill = constants.get(proto.input[0]), attributes.get("value")
    if not (proto.output and proto.output[0] in weights and shape is not None):
        return None
    sizes = [int(size) for size in shape.reshape(-1)] if shape.dtype == np.int64 else [-1]
    # What cannot be made is refused by the operator, in words of its own.
    if not isinstance(fill, np.ndarray) or fill.size != 1:
        return None
    if any(size < 0 for size in sizes) or math.prod(sizes) > most:
        return None
    return np.full(sizes, fill.reshape(()))
