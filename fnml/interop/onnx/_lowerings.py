"""How every primitive of JAX that can be exported is written, by its name."""

from collections.abc import Mapping

from fnml.interop.onnx import (
    _lower_bits,
    _lower_control,
    _lower_conv,
    _lower_dot,
    _lower_dynamic,
    _lower_elementwise,
    _lower_index,
    _lower_random,
    _lower_reduce,
    _lower_shape,
    _lower_sort,
    _lower_special,
    _lower_window,
)
from fnml.interop.onnx._builder import Lowering

FAMILIES: Mapping[str, Mapping[str, Lowering]] = {
    "elementwise": _lower_elementwise.LOWERINGS,
    "special functions": _lower_special.LOWERINGS,
    "bits": _lower_bits.LOWERINGS,
    "shapes": _lower_shape.LOWERINGS,
    "computed slices": _lower_dynamic.LOWERINGS,
    "reductions": _lower_reduce.LOWERINGS,
    "products": _lower_dot.LOWERINGS,
    "convolution": _lower_conv.LOWERINGS,
    "windows": _lower_window.LOWERINGS,
    "gather and scatter": _lower_index.LOWERINGS,
    "sorting": _lower_sort.LOWERINGS,
    "random numbers": _lower_random.LOWERINGS,
    "control flow and calls": _lower_control.LOWERINGS,
}
LOWERINGS: Mapping[str, Lowering] = {
    name: lowering for family in FAMILIES.values() for name, lowering in family.items()
}
