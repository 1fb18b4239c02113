"""The windows that convolution and pooling slide: their padding and their number."""

from typing import Any, NamedTuple

from fnml.core import ShapeError
from fnml.interop.onnx._node import Node
from fnml.interop.onnx._static import checked, where_is


class Windows(NamedTuple):
    """Sizes per spatial axis.

    Attributes:
      kernel: the window.
      strides: from one window to the next.
      dilations: between the elements of a window.
      pads: before and after; ``after`` may exceed the model's where sizes are rounded up.
      given: the padding that the model names, which counts as part of the input.
      counts: how many windows there are.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    given: tuple[tuple[int, int], ...]
    counts: tuple[int, ...]


def windows(node: Node, space: tuple[int, ...], kernel: tuple[int, ...]) -> Windows:
    """Read a node's attributes for an input whose spatial axes have the sizes ``space``.

    Raises:
      ShapeError: the attributes have another number of axes, or no window fits.
    """
    attributes, rank = node.attributes, len(space)
    strides = tuple(attributes.get("strides", (1,) * rank))
    dilations = tuple(attributes.get("dilations", (1,) * rank))
    flat = tuple(attributes.get("pads", (0,) * 2 * rank))
    if not len(kernel) == len(strides) == len(dilations) == rank == len(flat) / 2:
        raise ShapeError(
            f"{where_is(node)}: kernel {kernel}, strides {strides}, dilations {dilations} and pads "
            f"{flat} for {rank} spatial axes"
        )
    if min((*kernel, *strides, *dilations), default=1) < 1:
        raise ShapeError(f"{where_is(node)}: kernel, strides and dilations have to be positive")
    checked(node, kernel)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    auto = attributes.get("auto_pad", "NOTSET")
    given: list[tuple[int, int]] = []
    pads: list[tuple[int, int]] = []
    counts: list[int] = []
    for i, (size, span, stride) in enumerate(zip(space, spans, strides, strict=True)):
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            count = -(-size // stride)
            total = max((count - 1) * stride + span - size, 0)
            half = total // 2 if auto == "SAME_UPPER" else total - total // 2
            low, high = half, total - half
        else:
            low, high = (0, 0) if auto == "VALID" else (flat[i], flat[rank + i])
            steps = size + low + high - span
            count = steps // stride + 1
            if attributes.get("ceil_mode", 0) and auto != "VALID":
                count = -(-steps // stride) + 1
                # A window that would begin in the padding behind the input is left out.
                count -= (count - 1) * stride >= size + low
        if count < 0:
            raise ShapeError(f"{where_is(node)}: windows of {span} in {size} + {low} + {high}")
        checked(node, (max(size + low + high, 0),))
        given.append((low, high))
        pads.append((low, max(high, (count - 1) * stride + span - size - low)))
        counts.append(count)
    return Windows(kernel, strides, dilations, tuple(pads), tuple(given), tuple(counts))


def kernel_shape(node: Node, weight: Any = None) -> tuple[int, ...]:
    """Return the window's size: the attribute, or that of a weight ``[M, C, ...]``."""
    if "kernel_shape" in node.attributes:
        return tuple(node.attributes["kernel_shape"])
    return tuple(weight.shape[2:])
