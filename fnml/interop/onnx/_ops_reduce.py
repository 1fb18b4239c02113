"""Reductions over axes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from fnml.interop.onnx._dtypes import is_float, is_integer
from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._static import axis_of, namespace, static_ints, traced


def _reduction(function: Callable[..., Any], axes_input: int = 18, folds: bool = False) -> Operator:
    """Make an operator of ``function(xp, x, axes, keepdims)``.

    Args:
      function: the reduction.
      axes_input: the opset from which on the axes are an input.
      folds: whether ``xp`` may be numpy.
    """

    def run(node: Node, x: Any, axes: Any = None) -> Any:
        keep = bool(node.attributes.get("keepdims", 1))
        if node.version < axes_input:
            given = node.attributes.get("axes")
        else:
            given = None if axes is None else static_ints(node, 1, axes)
        if not given and node.attributes.get("noop_with_empty_axes", 0):
            given = ()
        elif not given:
            given = range(x.ndim)
        places = tuple(axis_of(node, axis, x.ndim) for axis in given) if x.ndim else ()
        xp: Any = namespace(x) if folds else jnp
        if xp is jnp:
            (x,) = traced(node, x)
        return function(xp, x, places, keep).astype(x.dtype)

    return run


def _extreme(largest: bool) -> Callable[..., Any]:
    def run(xp: Any, x: Any, axes: tuple[int, ...], keep: bool) -> Any:
        if x.dtype == np.bool_:
            return (xp.any if largest else xp.all)(x, axis=axes, keepdims=keep)
        function = xp.max if largest else xp.min
        return function(x, axis=axes, keepdims=keep, initial=_identity(x.dtype, largest))

    return run


def _identity(dtype: Any, largest: bool) -> Any:
    if is_float(dtype):
        return -np.inf if largest else np.inf
    info = jnp.iinfo(dtype)
    return int(info.min if largest else info.max)


def _log_sum_exp(xp: Any, x: Any, axes: tuple[int, ...], keep: bool) -> Any:
    x = x if is_float(x.dtype) else x.astype(jnp.float32)
    return logsumexp(x, axis=axes, keepdims=keep) if axes else x


def _l2(xp: Any, x: Any, axes: tuple[int, ...], keep: bool) -> Any:
    total = _sum(xp, x * x, axes, keep)
    return xp.sqrt(total if is_float(x.dtype) else total.astype(jnp.float32))


def _sum(xp: Any, x: Any, axes: tuple[int, ...], keep: bool) -> Any:
    return xp.sum(x, axis=axes, keepdims=keep, dtype=x.dtype)


def _log_sum(xp: Any, x: Any, axes: tuple[int, ...], keep: bool) -> Any:
    total = _sum(xp, x, axes, keep)
    return xp.log(total if is_float(x.dtype) else total.astype(jnp.float32))


def _mean(xp: Any, x: Any, axes: tuple[int, ...], keep: bool) -> Any:
    if is_integer(x.dtype):
        total = _sum(xp, x, axes, keep)
        return total // np.asarray(np.prod([x.shape[a] for a in axes]), total.dtype)
    return xp.mean(x, axis=axes, keepdims=keep)


OPERATORS: Mapping[str, Operator] = {
    "ReduceL1": _reduction(lambda xp, x, a, k: _sum(xp, abs(x), a, k)),
    "ReduceL2": _reduction(_l2),
    "ReduceLogSum": _reduction(_log_sum),
    "ReduceLogSumExp": _reduction(_log_sum_exp),
    "ReduceMax": _reduction(_extreme(True), folds=True),
    "ReduceMean": _reduction(_mean),
    "ReduceMin": _reduction(_extreme(False), folds=True),
    "ReduceProd": _reduction(lambda xp, x, a, k: xp.prod(x, axis=a, keepdims=k), folds=True),
    "ReduceSum": _reduction(_sum, axes_input=13, folds=True),
    "ReduceSumSquare": _reduction(lambda xp, x, a, k: _sum(xp, x * x, a, k)),
}
SHAPE_INPUTS = {name: (1,) for name in OPERATORS if name.startswith("Reduce")}
