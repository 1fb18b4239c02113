"""Which arrays of a model are parameters, and where they stand in the tree."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fnml.interop.onnx._operators import SHAPE_INPUTS

_TRAINABLE = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
# Only small arrays are read as shapes: weights behind a computed shape stay parameters.
_SHAPE_SIZE = 16
# The metadata that lists a file's parameters, where others would be taken for some.
PARAMETERS = "fnml.parameters"


def is_parameter(name: str, array: np.ndarray, shapes: frozenset[str], constant: bool) -> bool:
    """Tell whether an array is trained: floats of rank 1 and more, but no sizes or scales of them.

    Args:
      name: the array's name.
      array: its value.
      shapes: the names of :func:`shape_names`.
      constant: whether it is a Constant node's, where single numbers are no weights.
    """
    return (
        array.dtype in _TRAINABLE
        and array.ndim > 0
        and array.size > int(constant)
        and not (name in shapes and array.size <= _SHAPE_SIZE)
    )


def listed_parameters(metadata: Iterable[Any]) -> frozenset[str] | None:
    """Return the names that a file's metadata lists as its parameters (``to_onnx`` does)."""
    for entry in metadata:
        if entry.key == PARAMETERS:
            try:
                names = json.loads(entry.value)
            except (ValueError, RecursionError):
                return None
            if isinstance(names, list) and all(isinstance(name, str) for name in names):
                return frozenset(names)
    return None


def shape_names(nodes: Sequence[Any], outputs: Iterable[str] = ()) -> frozenset[str]:
    """Return the names of values from which nodes (and their subgraphs) take shapes.

    Args:
      nodes: NodeProtos in topological order.
      outputs: names that are known to be taken so.
    """
    needed = set(outputs)
    for node in reversed(nodes):
        bodies = [a.g for a in node.attribute if a.HasField("g")]
        hit = any(name in needed for name in node.output)
        for body in bodies:
            results = [out.name for out in body.output] if hit else []
            inner = shape_names(body.node, results)
            needed |= inner
            # A loop's body takes as its last inputs the node's last inputs.
            pairs = zip(reversed(body.input), reversed(node.input), strict=False)
            needed.update(outside for own, outside in pairs if own.name in inner)
        if hit and node.op_type not in ("Shape", "Size"):
            needed.update(node.input)
        places = SHAPE_INPUTS.get(node.op_type, ()) if node.domain in ("", "ai.onnx") else ()
        needed.update(node.input[i] for i in places if i < len(node.input))
    return frozenset(needed)


def tree_paths(names: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
    """Lay names out as paths of a tree: split at ``/``, or else at ``.``, where that is unambiguous.

    A name whose path would be another's, or lie above it, stays whole.

    >>> dict(tree_paths(["conv.weight", "/head/bias", "scale"]))
    {'conv.weight': ('conv', 'weight'), '/head/bias': ('head', 'bias'), 'scale': ('scale',)}
    >>> dict(tree_paths(["a", "a/b"]))
    {'a': ('a',), 'a/b': ('a/b',)}
    """
    names = list(names)
    split = {name: _split(name) for name in names}
    while True:
        taken: dict[tuple[str, ...], int] = {}
        for path in split.values():
            taken[path] = taken.get(path, 0) + 1
        clashing = {
            name
            for name, path in split.items()
            if path != (name,)
            and (taken[path] > 1 or any(path[:i] in taken for i in range(1, len(path))))
        }
        if not clashing:
            return split
        split.update({name: (name,) for name in clashing})


def _split(name: str) -> tuple[str, ...]:
    parts = tuple(part for part in name.split("/" if "/" in name else ".") if part)
    return parts or (name,)


def nest(values: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Make nested dicts of values by path.

    >>> nest({("a", "b"): 1, ("c",): 2})
    {'a': {'b': 1}, 'c': 2}
    """
    tree: dict[str, Any] = {}
    for path, value in values.items():
        here = tree
        for part in path[:-1]:
            here = here.setdefault(part, {})
        here[path[-1]] = value
    return tree
