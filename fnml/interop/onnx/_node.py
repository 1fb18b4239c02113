"""One call of an operator, and the graph that it stands in, decoded."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Operator = Callable[..., Any]


class Port(NamedTuple):
    """An input or output of a graph.

    Attributes:
      name: its name in the file.
      dtype: its dtype as the file has it (``int64`` also where JAX computes in 32 bit), ``object``
        for strings; ``None`` where the file does not tell.
      shape: an int for a known dimension, a name for a symbolic one, ``None`` for an unknown one;
        ``None`` instead of a tuple for unknown rank.
      kind: ``"tensor"``, ``"sequence"``, ``"optional"`` or ``"unknown"``.
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str | None, ...] | None
    kind: str = "tensor"


class Outer(NamedTuple):
    """What a node may use of the run it stands in.

    Attributes:
      run: ``run(graph, *inputs, turn=None, isolated=False) -> tuple of outputs`` runs a subgraph,
        which sees the values around the node unless it is isolated. ``turn`` is the iteration of
        a loop: random numbers differ by it.
      key: ``key() -> typed key`` of this node in this call, for random operators. Raises a named
        error where the caller gave no ``key=``.
    """

    run: Callable[..., tuple[Any, ...]]
    key: Callable[[], jax.Array]


class Node(NamedTuple):
    """One decoded call of an operator.

    Attributes:
      op: the operator, such as ``"Gemm"``.
      domain: ``""`` for ai.onnx.
      name: the node's name in the file, or one made of the operator and its place.
      version: the opset version that the model (or function) imports for the domain.
      attributes: ints, floats, str, arrays, lists of them, and :class:`Graph` for subgraphs.
      inputs: names of the values it takes, ``""`` where an optional one is left out.
      outputs: names of the values it makes, ``""`` where one is not wanted.
      outer: what it may use of the run.
    """

    op: str
    domain: str
    name: str
    version: int
    attributes: Mapping[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    outer: Outer


class Step(NamedTuple):
    """A node and what computes it: ``operator(node, *inputs) -> array or tuple of arrays``.

    ``folds`` tells whether a call whose inputs are all known may be computed while tracing: one
    that runs subgraphs or draws random numbers may not.
    """

    node: Node
    operator: Operator
    folds: bool


class Graph(NamedTuple):
    """A decoded graph, subgraph or function body.

    Attributes:
      name: a path that no other graph of the model has.
      steps: in the order of the file, which is topological.
      inputs: without those that have an initializer of the same name.
      outputs: in order.
      constants: arrays known at trace time, by name.
      params: what the parameters among its values are called in the whole model, by name.
    """

    name: str
    steps: tuple[Step, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    constants: Mapping[str, np.ndarray]
    params: Mapping[str, str]
