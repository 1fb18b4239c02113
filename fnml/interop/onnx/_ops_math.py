"""Arithmetic: elementwise with broadcasting, and over one axis."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from fnml.interop.onnx._dtypes import is_float, is_integer, widest
from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._static import align, axis_of, is_static, is_symbolic, namespace, traced


def old_broadcast(node: Node, a: Any, b: Any) -> Any:
    """Lay ``b`` out against ``a`` as opsets before 7 say, by ``broadcast`` and ``axis``."""
    if node.version >= 7 or not node.attributes.get("broadcast", 0):
        return b
    axis = node.attributes.get("axis", a.ndim - b.ndim)
    axis = axis_of(node, axis, a.ndim) if b.ndim else 0
    return b.reshape(b.shape + (1,) * max(a.ndim - axis - b.ndim, 0))


def binary(function: Callable[[Any, Any, Any], Any]) -> Operator:
    """Make an operator of ``function(xp, a, b)``, which broadcasts."""

    def run(node: Node, a: Any, b: Any) -> Any:
        a, b = align(node, a, old_broadcast(node, a, b))
        return function(namespace(a, b), a, b)

    return run


def unary(function: Callable[[Any], Any], known: Callable[[Any], Any] | None = None) -> Operator:
    """Make an operator of JAX's function, and NumPy's for known values where it has one."""

    def run(node: Node, x: Any) -> Any:
        if known is not None and isinstance(x, np.ndarray):
            return np.asarray(known(x)).astype(x.dtype, copy=False)
        (x,) = traced(node, x)
        return function(x)

    return run


def _divide(xp: Any, a: Any, b: Any) -> Any:
    if is_symbolic(a) or is_symbolic(b):
        return a // b  # sizes are not negative
    if not is_integer(a.dtype):
        return a / b
    if xp is jnp:
        return lax.div(*jnp.broadcast_arrays(a, b))
    # Towards zero, as C does it.
    b = np.where(b == 0, np.ones_like(b), b)
    quotient = a // b
    return quotient + ((quotient < 0) & (quotient * b != a)).astype(quotient.dtype)


def _power(node: Node, a: Any, b: Any) -> Any:
    a, b = align(node, a, old_broadcast(node, a, b))
    xp = namespace(a, b)
    if is_integer(a.dtype) and is_float(b.dtype):
        wide = b.dtype if b.dtype.itemsize >= 4 else np.dtype(np.float32)
        return xp.power(a.astype(wide), b.astype(wide)).astype(a.dtype)
    if is_integer(a.dtype) and xp is np:
        return np.power(a.astype(np.float64), b.astype(np.float64)).astype(a.dtype)
    if is_float(a.dtype) and is_integer(b.dtype) and xp is jnp:
        return jnp.power(a, b.astype(a.dtype))
    return xp.power(a, b.astype(a.dtype))


def _mod(node: Node, a: Any, b: Any) -> Any:
    a, b = align(node, a, b)
    xp = namespace(a, b)
    return xp.fmod(a, b) if node.attributes.get("fmod", 0) else xp.mod(a, b)


def variadic(function: Callable[[Any, Any, Any], Any]) -> Operator:
    """Make an operator that folds ``function(xp, a, b)`` over any number of inputs."""

    def run(node: Node, *values: Any) -> Any:
        values = align(node, *values)
        xp = namespace(*values)
        result = values[0]
        for value in values[1:]:
            result = function(xp, result, value)
        return result

    return run


def _mean(node: Node, *values: Any) -> Any:
    total = variadic(lambda xp, a, b: a + b)(node, *values)
    return total / np.asarray(len(values), total.dtype)


def _shift(xp: Any, a: Any, b: Any, left: bool) -> Any:
    most = np.asarray(a.dtype.itemsize * 8 - 1, b.dtype)
    small = b <= most
    amount = xp.where(small, b, xp.full_like(b, most))
    moved = (a << amount) if left else (a >> amount)
    # Nothing is left, but for the sign of a number shifted to the right.
    signed = jnp.issubdtype(a.dtype, jnp.signedinteger) and not left
    return moved if signed else xp.where(small, moved, xp.zeros_like(moved))


def _bit_shift(node: Node, a: Any, b: Any) -> Any:
    a, b = align(node, a, b)
    return _shift(namespace(a, b), a, b, node.attributes["direction"] == "LEFT")


def _clip(node: Node, x: Any, low: Any = None, high: Any = None) -> Any:
    if node.version < 11:
        attributes = node.attributes
        low = np.asarray(attributes["min"], x.dtype) if "min" in attributes else None
        high = np.asarray(attributes["max"], x.dtype) if "max" in attributes else None
    x, low, high = align(node, x, low, high)
    xp = namespace(x, low, high)
    x = x if low is None else xp.maximum(x, low)
    return x if high is None else xp.minimum(x, high)


def _matmul(node: Node, a: Any, b: Any) -> Any:
    if is_static(a, b):
        return np.matmul(a, b)
    a, b = traced(node, a, b)
    return matmul(a, b)


def matmul(a: Any, b: Any) -> Any:
    """Multiply as ``numpy.matmul`` does, in the wider of two float types."""
    if a.dtype != b.dtype:
        wide = widest(a.dtype, b.dtype)
        a, b = a.astype(wide), b.astype(wide)
    if a.ndim > 2 and 2 < b.ndim != a.ndim:
        rank = max(a.ndim, b.ndim)
        a = a.reshape((1,) * (rank - a.ndim) + a.shape)
        b = b.reshape((1,) * (rank - b.ndim) + b.shape)
    return jnp.matmul(a, b)


def _gemm(node: Node, a: Any, b: Any, c: Any = None) -> Any:
    attributes = node.attributes
    c = None if c is None else old_broadcast(node, a, c)
    a, b, c = traced(node, a, b, c)
    a = a.T if attributes.get("transA", 0) else a
    b = b.T if attributes.get("transB", 0) else b
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    product = matmul(a, b)
    if alpha != 1:
        product = (product * alpha).astype(product.dtype)
    if c is None or beta == 0:
        return product
    product, c = align(node, product, c)
    return product + (c if beta == 1 else (c * beta).astype(c.dtype))


def _round(x: Any) -> Any:
    return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)


def _sign(x: Any) -> Any:
    return jnp.sign(x)


def _numbers(function: Callable[..., Any]) -> Callable[[Any, Any, Any], Any]:
    name = function.__name__
    return lambda xp, a, b: getattr(xp, name)(a, b)


OPERATORS: Mapping[str, Operator] = {
    "Abs": unary(jnp.abs, np.abs),
    "Acos": unary(jnp.arccos),
    "Acosh": unary(jnp.arccosh),
    "Add": binary(lambda xp, a, b: a + b),
    "Asin": unary(jnp.arcsin),
    "Asinh": unary(jnp.arcsinh),
    "Atan": unary(jnp.arctan),
    "Atanh": unary(jnp.arctanh),
    "BitShift": _bit_shift,
    "BitwiseAnd": binary(lambda xp, a, b: a & b),
    "BitwiseNot": unary(lambda x: ~x, lambda x: ~x),
    "BitwiseOr": binary(lambda xp, a, b: a | b),
    "BitwiseXor": binary(lambda xp, a, b: a ^ b),
    "Ceil": unary(jnp.ceil, np.ceil),
    "Clip": _clip,
    "Cos": unary(jnp.cos),
    "Cosh": unary(jnp.cosh),
    "Div": binary(_divide),
    "Erf": unary(lax.erf),
    "Exp": unary(jnp.exp, np.exp),
    "Floor": unary(jnp.floor, np.floor),
    "Gemm": _gemm,
    "Log": unary(jnp.log, np.log),
    "MatMul": _matmul,
    "Max": variadic(_numbers(np.maximum)),
    "Mean": _mean,
    "Min": variadic(_numbers(np.minimum)),
    "Mod": _mod,
    "Mul": binary(lambda xp, a, b: a * b),
    "Neg": unary(lambda x: -x, np.negative),
    "Pow": _power,
    "Reciprocal": unary(lambda x: 1 / x, lambda x: 1 / x),
    "Round": unary(_round, np.round),
    "Sign": unary(_sign, np.sign),
    "Sin": unary(jnp.sin),
    "Sinh": unary(jnp.sinh),
    "Sqrt": unary(jnp.sqrt, np.sqrt),
    "Sub": binary(lambda xp, a, b: a - b),
    "Sum": variadic(lambda xp, a, b: a + b),
    "Tan": unary(jnp.tan),
}
