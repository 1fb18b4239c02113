"""Evaluate a decoded graph: what is known is folded, the rest is traced by JAX."""

import functools
from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fnml.core import ConfigError, FnmlError, ShapeError, fold_name
from fnml.interop.onnx._node import Graph, Node, Outer, Step
from fnml.interop.onnx._static import is_static, is_symbolic, where_is


class Call(NamedTuple):
    """What one call of ``apply`` brings to every graph of the model.

    Attributes:
      params: arrays by the names that graphs give them in ``Graph.params``.
      key: the random key, or ``None``.
      path: the nodes, from the outside in, whose bodies are running.
    """

    params: Mapping[str, Any]
    key: jax.Array | None
    path: tuple[str, ...] = ()


def run_graph(
    graph: Graph,
    inputs: Sequence[Any],
    call: Call,
    outside: ChainMap[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Run a graph's nodes and return its outputs.

    Args:
      graph: the graph.
      inputs: a value for each of ``graph.inputs``.
      call: the parameters and the key.
      outside: the values that a subgraph sees beside its own.

    Raises:
      ShapeError: a node cannot be computed from what it is given.
    """
    values = ChainMap[str, Any]({}) if outside is None else outside.new_child()
    if len(inputs) != len(graph.inputs):
        raise ShapeError(
            f"the graph {graph.name!r} takes {len(graph.inputs)} inputs, and was given {len(inputs)}"
        )
    values.update(graph.constants)
    values.update({name: call.params[key] for name, key in graph.params.items()})
    values.update({port.name: x for port, x in zip(graph.inputs, inputs, strict=True)})
    for step in graph.steps:
        node = step.node._replace(outer=_outer(step.node, call, values))
        given = [values[name] if name else None for name in node.inputs]
        results = _compute(step, node, given)
        if len(results) < sum(map(bool, node.outputs)) and any(node.outputs[len(results) :]):
            raise ShapeError(
                f"{where_is(node)}: makes {len(results)} outputs, and the model wants "
                f"{len(node.outputs)}"
            )
        values.update({n: x for n, x in zip(node.outputs, results, strict=False) if n})
    # A function's body may leave out optional outputs.
    return tuple(values.get(port.name) for port in graph.outputs)


def run_body(graph: Graph, node: Node, *inputs: Any) -> tuple[Any, ...]:
    """Run a function's body: an operator that is a graph, which sees nothing around it."""
    missing = len(graph.inputs) - len(inputs)
    return node.outer.run(graph, *inputs, *[None] * missing, isolated=True)


def _outer(node: Node, call: Call, values: ChainMap[str, Any]) -> Outer:
    def run(
        graph: Graph, *inputs: Any, turn: Any = None, isolated: bool = False
    ) -> tuple[Any, ...]:
        key = call.key
        if key is not None and turn is not None:
            key = jax.random.fold_in(key, turn)
        inner = call._replace(key=key, path=(*call.path, node.name))
        return run_graph(graph, inputs, inner, None if isolated else values)

    def key() -> jax.Array:
        if call.key is None:
            raise ConfigError(
                f"{where_is(node)} draws random numbers: call model.apply(params, ..., key=key)"
            )
        return fold_name(call.key, "/".join((*call.path, node.name)))

    return Outer(run, key)


def _compute(step: Step, node: Node, inputs: list[Any]) -> tuple[Any, ...]:
    try:
        with np.errstate(all="ignore"):
            if step.folds and any(map(is_symbolic, inputs)):
                results = step.operator(node, *inputs)
                results = results if isinstance(results, tuple) else (results,)
                return tuple(_known(x) if is_static(x) else x for x in results)
            if step.folds and is_static(*inputs):
                # Known values keep 64 bit: shapes and indices are computed in it.
                with jax.enable_x64(True), jax.ensure_compile_time_eval():
                    results = step.operator(node, *inputs)
                    results = results if isinstance(results, tuple) else (results,)
                    return tuple(map(_known, results))
            results = step.operator(node, *inputs)
            return results if isinstance(results, tuple) else (results,)
    except FnmlError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise ShapeError(
            f"{where_is(node)} cannot be computed from {_shapes(inputs)}: "
            f"{type(error).__name__}: {reason}"
        ) from error


def _known(value: Any) -> Any:
    if isinstance(value, list):
        return [_known(v) for v in value]
    if value is None:
        return None
    value = np.asarray(value)
    # What is taken from symbolic sizes may be plain numbers.
    numbers = value.dtype == object and all(type(x) is int for x in value.flat)
    return value.astype(np.int64) if numbers and value.size else value


def _shapes(values: Sequence[Any]) -> str:
    return ", ".join(
        f"{v.dtype}{list(v.shape)}" if hasattr(v, "shape") else type(v).__name__ for v in values
    )


def body_operator(graph: Graph) -> Any:
    """Return the operator that runs a function's body."""
    return functools.partial(run_body, graph)
