"""Symbolic dimensions: sizes that are known when a file is run, as arithmetic on int64 tensors."""

import ast
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Dim = Any
Size = int | str


def is_static(dim: Dim) -> bool:
    """Tell whether a dimension is a plain number."""
    return isinstance(dim, int | np.integer)


def all_static(*shapes: Sequence[Dim]) -> bool:
    """Tell whether all dimensions of all shapes are plain numbers."""
    return all(is_static(dim) for shape in shapes for dim in shape)


def label(dim: Dim) -> int | str:
    """Return a dimension as the file shows it: a number, or an expression such as ``B*T``."""
    return int(dim) if is_static(dim) else str(dim)


def expression(dim: Dim) -> ast.expr:
    """Parse a symbolic dimension: jax.export writes it as it reads it, in Python's grammar.

    >>> ast.dump(expression("B^2")) == ast.dump(expression("B**2"))
    True
    """
    return ast.parse(str(dim).replace("^", "**"), mode="eval").body


def evaluate(node: ast.expr, symbol: Callable[[str], Size], emit: Callable[..., str]) -> Size:
    """Turn a parsed dimension into a number, or the name of an int64 ``[1]`` tensor.

    Args:
      node: what :func:`expression` returns, or a part of it.
      symbol: the tensor that holds a symbol's size.
      emit: ``emit(op, *inputs, **attributes) -> name``; numbers among the inputs are constants.
    """

    def value(part: ast.expr) -> Size:
        return evaluate(part, symbol, emit)

    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name):
            return symbol(name)
        case ast.UnaryOp(op=ast.USub(), operand=part):
            return _combine("Mul", value(part), -1, emit)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _combine("Add", value(left), value(right), emit)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _combine("Sub", value(left), value(right), emit)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _combine("Mul", value(left), value(right), emit)
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int(power))):
            result: Size = 1
            for _ in range(power):
                result = _combine("Mul", result, value(left), emit)
            return result
        case ast.Call(func=ast.Name(id=name), args=args):
            return _function(name, [value(part) for part in args], emit)
    raise ValueError(f"the symbolic dimension {ast.unparse(node)} has an unknown form")


def _function(name: str, args: list[Size], emit: Callable[..., str]) -> Size:
    if name == "non_negative":
        return _combine("Max", args[0], 0, emit)
    if name == "floordiv":
        # Div rounds towards zero, the dimension downwards.
        rest = _combine("Mod", args[0], args[1], emit)
        return _combine("Div", _combine("Sub", args[0], rest, emit), args[1], emit)
    ops = {"mod": "Mod", "max": "Max", "min": "Min"}
    if name not in ops:
        raise ValueError(f"a symbolic dimension calls the unknown function {name}")
    return _combine(ops[name], args[0], args[1], emit)


_NUMBERS: dict[str, Callable[[int, int], int]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: a // b,
    "Mod": lambda a, b: a % b,
    "Max": max,
    "Min": min,
}


def _combine(op: str, a: Size, b: Size, emit: Callable[..., str]) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return _NUMBERS[op](a, b)
    if (op in ("Mul", "Div") and b == 1) or (op in ("Add", "Sub") and b == 0):
        return a
    if (op == "Mul" and a == 1) or (op == "Add" and a == 0):
        return b
    return emit(op, *(np.array([x], np.int64) if isinstance(x, int) else x for x in (a, b)))
