"""The tables of all operators, merged from those of the families.

A family's file ends with ``OPERATORS``: the operator's name, after its domain and a dot unless the
domain is ai.onnx (``"ai.onnx.preview.training.Adam"``), to its function. Where operators take
inputs that decide a shape or a structure, the file also has ``SHAPE_INPUTS``: name to the places
of those inputs. They stay constants (they never become parameters).

Sequences are Python lists; an optional is its value, or ``None`` when empty.
"""

from collections.abc import Mapping
from types import ModuleType

from fnml.interop.onnx import (
    _ops_activation,
    _ops_attention,
    _ops_blocks,
    _ops_cast,
    _ops_control,
    _ops_conv,
    _ops_image,
    _ops_linear_attention,
    _ops_logic,
    _ops_losses,
    _ops_math,
    _ops_matrix,
    _ops_ml,
    _ops_norm,
    _ops_pool,
    _ops_quantized,
    _ops_random,
    _ops_recurrent,
    _ops_reduce,
    _ops_regions,
    _ops_resize,
    _ops_scatter,
    _ops_select,
    _ops_sequence,
    _ops_shape,
    _ops_signal,
    _ops_text,
    _ops_training,
    _ops_trees,
)
from fnml.interop.onnx._node import Operator

_FAMILIES: tuple[ModuleType, ...] = (
    _ops_activation,
    _ops_attention,
    _ops_blocks,
    _ops_cast,
    _ops_control,
    _ops_conv,
    _ops_image,
    _ops_linear_attention,
    _ops_logic,
    _ops_losses,
    _ops_math,
    _ops_matrix,
    _ops_ml,
    _ops_norm,
    _ops_pool,
    _ops_quantized,
    _ops_random,
    _ops_recurrent,
    _ops_reduce,
    _ops_regions,
    _ops_resize,
    _ops_scatter,
    _ops_select,
    _ops_sequence,
    _ops_shape,
    _ops_signal,
    _ops_text,
    _ops_training,
    _ops_trees,
)

OPERATORS: Mapping[str, Operator] = {
    name: operator for family in _FAMILIES for name, operator in family.OPERATORS.items()
}
SHAPE_INPUTS: Mapping[str, tuple[int, ...]] = {
    name: places
    for family in _FAMILIES
    for name, places in getattr(family, "SHAPE_INPUTS", {}).items()
}
# These draw random numbers, or run subgraphs: a call is not folded even where its inputs are known.
UNFOLDED = frozenset(
    (
        "Bernoulli",
        "Dropout",
        "If",
        "Loop",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Scan",
        "SequenceMap",
    )
)
