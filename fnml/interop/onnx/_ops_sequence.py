"""Sequences, which are Python lists, and optionals, which are a value or ``None``."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from fnml.core import ShapeError
from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._static import (
    axis_of,
    is_static,
    namespace,
    static_ints,
    traced,
    where_is,
)


def _place(node: Node, values: list[Any], which: int, position: Any, end: int) -> int:
    """Return a position in a sequence as a number from 0, at most ``end - 1``."""
    (place,) = static_ints(node, which, position)
    if not -len(values) <= place < end:
        raise ShapeError(
            f"{where_is(node)}: position {place} of a sequence of {len(values)} values"
        )
    return place + len(values) if place < 0 else place


def _sequence_construct(node: Node, *values: Any) -> list[Any]:
    return list(values)


def _sequence_empty(node: Node) -> list[Any]:
    return []


def _sequence_at(node: Node, values: list[Any], position: Any) -> Any:
    return values[_place(node, values, 1, position, len(values))]


def _sequence_insert(node: Node, values: list[Any], value: Any, position: Any = None) -> list[Any]:
    end = len(values)
    place = end if position is None else _place(node, values, 2, position, end + 1)
    return [*values[:place], value, *values[place:]]


def _sequence_erase(node: Node, values: list[Any], position: Any = None) -> list[Any]:
    end = len(values)
    place = end - 1 if position is None else _place(node, values, 1, position, end)
    return [*values[:place], *values[place + 1 :]]


def _sequence_length(node: Node, values: list[Any]) -> np.ndarray:
    return np.asarray(len(values), np.int64)


def _split_to_sequence(node: Node, x: Any, split: Any = None) -> list[Any]:
    axis = axis_of(node, node.attributes.get("axis", 0), x.ndim)
    size = x.shape[axis]
    if split is None:
        sizes: tuple[int, ...] = (1,) * size
    else:
        sizes = static_ints(node, 1, split)
        if split.ndim == 0:
            ends = [*range(0, size, sizes[0]), size]
            sizes = tuple(b - a for a, b in itertools.pairwise(ends))
    keep = split is not None or node.attributes.get("keepdims", 1)
    starts = np.cumsum([0, *sizes])
    parts = [
        x[tuple(slice(a, a + n) if d == axis else slice(None) for d in range(x.ndim))]
        for a, n in zip(starts, sizes, strict=False)
    ]
    return parts if keep else [part.squeeze(axis) for part in parts]


def _concat_from_sequence(node: Node, values: list[Any]) -> Any:
    xp = namespace(values)
    values = values if is_static(values) else list(traced(node, *values))
    axis = node.attributes["axis"]
    if node.attributes.get("new_axis", 0):
        return xp.stack(values, axis=axis)
    return xp.concatenate(values, axis=axis)


def _optional(node: Node, value: Any = None) -> Any:
    return value


def _optional_has_element(node: Node, value: Any = None) -> np.ndarray:
    return np.asarray(value is not None)


def _optional_get_element(node: Node, value: Any = None) -> Any:
    if value is None:
        raise ShapeError(f"{where_is(node)}: the optional {node.inputs[:1]} is empty")
    return value


OPERATORS: Mapping[str, Operator] = {
    "ConcatFromSequence": _concat_from_sequence,
    "Optional": _optional,
    "OptionalGetElement": _optional_get_element,
    "OptionalHasElement": _optional_has_element,
    "SequenceAt": _sequence_at,
    "SequenceConstruct": _sequence_construct,
    "SequenceEmpty": _sequence_empty,
    "SequenceErase": _sequence_erase,
    "SequenceInsert": _sequence_insert,
    "SequenceLength": _sequence_length,
    "SplitToSequence": _split_to_sequence,
}

SHAPE_INPUTS: Mapping[str, tuple[int, ...]] = {
    "SequenceAt": (1,),
    "SequenceErase": (1,),
    "SequenceInsert": (2,),
    "SplitToSequence": (1,),
}
