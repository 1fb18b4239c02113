"""Comparisons, truth values, and choosing by them."""

from collections.abc import Callable, Mapping
from typing import Any

from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._ops_math import binary, old_broadcast
from fnml.interop.onnx._static import align, namespace


def _compare(function: Callable[[Any, Any], Any]) -> Operator:
    def run(node: Node, a: Any, b: Any) -> Any:
        a, b = align(node, a, old_broadcast(node, a, b))
        return function(a, b)

    return run


def _not(node: Node, x: Any) -> Any:
    return namespace(x).logical_not(x)


def _where(node: Node, condition: Any, a: Any, b: Any) -> Any:
    condition, a, b = align(node, condition, a, b)
    return namespace(condition, a, b).where(condition, a, b)


OPERATORS: Mapping[str, Operator] = {
    "And": binary(lambda xp, a, b: a & b),
    "Equal": _compare(lambda a, b: a == b),
    "Greater": _compare(lambda a, b: a > b),
    "GreaterOrEqual": _compare(lambda a, b: a >= b),
    "Less": _compare(lambda a, b: a < b),
    "LessOrEqual": _compare(lambda a, b: a <= b),
    "Not": _not,
    "Or": binary(lambda xp, a, b: a | b),
    "Where": _where,
    "Xor": binary(lambda xp, a, b: a ^ b),
}
