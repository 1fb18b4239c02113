"""Decode a model's protos into graphs of operators, and find all that is unsupported."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fnml.core import DataError, nearest
from fnml.interop.onnx._dtypes import DTYPES
from fnml.interop.onnx._filled_weights import filled_weights, weight_names
from fnml.interop.onnx._names import is_parameter, shape_names
from fnml.interop.onnx._node import Graph, Node, Operator, Outer, Port, Step
from fnml.interop.onnx._operators import OPERATORS, UNFOLDED
from fnml.interop.onnx._run import body_operator
from fnml.interop.onnx._schemas import find_schema, schema_operator
from fnml.interop.onnx._static import MOST_ELEMENTS
from fnml.interop.onnx._tensors import decode_sparse, decode_tensor

# A file of a few bytes could otherwise name functions that call each other without end.
_DEPTH = 40
_EXPANDED_NODES = 500_000

Functions = Mapping[tuple[str, str, str], Any]


@dataclass
class Decoding:
    """What decoding one model gathers.

    Attributes:
      folder: where files with external data lie, or ``None``.
      functions: the model's own functions, by domain, name and overload.
      problems: what is unsupported, one line each.
      arrays: the parameters' values by the name that graphs call them by.
      keys: that name by graph and value.
      left: how many nodes functions may still expand to.
      fill: how many numbers weights that are filled with one value may still take.
      named: the parameters' names, where the file itself lists them.
    """

    folder: Path | None = None
    functions: Functions = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    keys: dict[tuple[str, str], str] = field(default_factory=dict)
    left: int = _EXPANDED_NODES
    fill: int = MOST_ELEMENTS
    named: frozenset[str] | None = None

    def add_parameter(self, graph: str, name: str, array: np.ndarray) -> str:
        """Keep a parameter; a function that is called twice has it once."""
        if (graph, name) not in self.keys:
            key = name if name not in self.arrays else f"{graph}/{name}"
            while key in self.arrays:
                key += "_"
            self.keys[graph, name] = key
            self.arrays[key] = array
        return self.keys[graph, name]


@dataclass(frozen=True)
class Scope:
    """What holds for the nodes of one graph or function.

    Attributes:
      name: the graph's path.
      opsets: version by domain.
      known: names that may be used.
      shapes: names of values that shapes are taken from.
      bound: a function's attributes, where the nodes are those of a function.
      trains: whether arrays become parameters.
      depth: how deeply the graph is nested.
    """

    name: str
    opsets: Mapping[str, int]
    known: AbstractSet[str] = frozenset()
    shapes: frozenset[str] = frozenset()
    bound: Mapping[str, Any] | None = None
    trains: bool = True
    depth: int = 0


def decode_port(info: Any, problems: list[str]) -> Port:
    """Decode a ValueInfoProto; types that cannot enter or leave are added to the problems."""
    _check_text(info.name)
    kind = info.type.WhichOneof("value")
    tensor, label = info.type, "tensor"
    if kind in ("sequence_type", "optional_type"):
        label = "sequence" if kind == "sequence_type" else "optional"
        while kind in ("sequence_type", "optional_type"):
            tensor = getattr(tensor, kind).elem_type
            kind = tensor.WhichOneof("value")
            label = "optional" if kind == "sequence_type" else label
        return Port(info.name, DTYPES.get(tensor.tensor_type.elem_type), None, label)
    if kind is None:
        return Port(info.name, None, None, "unknown")
    if kind != "tensor_type":
        problems.append(f"{info.name!r} has the type {kind}")
        return Port(info.name, None, None, "unknown")
    number = tensor.tensor_type.elem_type
    if number and number not in DTYPES:
        problems.append(f"{info.name!r} has element type {number}")
    shape = None
    if tensor.tensor_type.HasField("shape"):
        shape = tuple(_dimension(d) for d in tensor.tensor_type.shape.dim)
    return Port(info.name, DTYPES.get(number), shape)


def _dimension(dim: Any) -> int | str | None:
    match dim.WhichOneof("value"):
        case "dim_value":
            # Writers put 0 or less for a size that they do not know.
            return dim.dim_value if dim.dim_value > 0 else None
        case "dim_param":
            return None if dim.dim_param in ("", "?") else dim.dim_param
    return None


def decode_graph(proto: Any, scope: Scope, ctx: Decoding) -> Graph:
    """Decode a GraphProto with all its subgraphs.

    Raises:
      DataError: the graph contradicts itself or is nested too deeply.
    """
    constants: dict[str, np.ndarray] = {}
    params: dict[str, str] = {}
    arrays = {
        t.name: decode_tensor(t, ctx.folder, f"initializer {t.name!r}") for t in proto.initializer
    }
    for sparse in proto.sparse_initializer:
        name = sparse.values.name
        arrays[name] = decode_sparse(sparse, ctx.folder, f"sparse initializer {name!r}")
    for name, array in arrays.items():
        _place(name, array, scope, ctx, constants, params, constant=False)
    inputs = tuple(decode_port(i, ctx.problems) for i in proto.input if i.name not in arrays)
    outputs = tuple(decode_port(o, ctx.problems) for o in proto.output)
    known = scope.known | arrays.keys() | {port.name for port in inputs}
    steps = decode_nodes(proto.node, scope, known, ctx, constants, params)
    made = {name for node in proto.node for name in node.output}
    _check_made([o.name for o in outputs], known | made, scope)
    return Graph(scope.name, tuple(steps), inputs, outputs, constants, params)


def decode_function(proto: Any, bound: Mapping[str, Any], scope: Scope, ctx: Decoding) -> Graph:
    """Decode a FunctionProto's body for one call, in which its attributes have values."""
    constants: dict[str, np.ndarray] = {}
    params: dict[str, str] = {}
    opsets = {**scope.opsets, **{_domain(o.domain): o.version for o in proto.opset_import}}
    here = replace(
        scope, opsets=opsets, known=frozenset(), shapes=shape_names(proto.node), bound=bound
    )
    steps = decode_nodes(proto.node, here, frozenset(proto.input), ctx, constants, params)
    inputs = tuple(Port(name, None, None, "unknown") for name in proto.input)
    outputs = tuple(Port(name, None, None, "unknown") for name in proto.output)
    return Graph(scope.name, tuple(steps), inputs, outputs, constants, params)


def decode_nodes(
    nodes: Sequence[Any],
    scope: Scope,
    known: AbstractSet[str],
    ctx: Decoding,
    constants: dict[str, np.ndarray],
    params: dict[str, str],
) -> list[Step]:
    """Decode nodes; Constants and filled weights among them go to ``constants`` or ``params``."""
    if scope.depth > _DEPTH:
        raise DataError(f"{scope.name}: graphs and functions are nested deeper than {_DEPTH}")
    steps = []
    defined = set(known)
    weights = weight_names(nodes)
    for index, proto in enumerate(nodes):
        name = proto.name or f"{proto.op_type}_{index}"
        path = f"{scope.name}/{name}" if scope.name else name
        inside = replace(scope, name=path, known=defined, depth=scope.depth + 1)
        _check_made(proto.input, defined | {""}, inside)
        attributes = decode_attributes(proto, inside, ctx)
        domain = _domain(proto.domain)
        if proto.op_type == "Constant" and domain == "":
            _check_outputs(proto, 1, inside)
            value = _constant(attributes, inside.name)
            bound = any(a.ref_attr_name for a in proto.attribute)
            _place(proto.output[0], value, scope, ctx, constants, params, True, bound)
        elif (
            filled := filled_weights(proto, domain, attributes, constants, weights, ctx.fill)
        ) is not None:
            ctx.fill -= filled.size
            _place(proto.output[0], filled, scope, ctx, constants, params, True)
        else:
            step = _step(proto, domain, name, attributes, inside, ctx)
            if step is not None:
                steps.append(step)
        defined.update(proto.output)
    return steps


def _step(
    proto: Any, domain: str, name: str, attributes: dict[str, Any], scope: Scope, ctx: Decoding
) -> Step | None:
    version = scope.opsets.get(domain, 0)
    node = Node(
        proto.op_type,
        domain,
        name,
        version,
        attributes,
        tuple(proto.input),
        tuple(proto.output),
        _NOWHERE,
    )
    label = f"{proto.op_type}" if not domain else f"{domain}.{proto.op_type}"
    function = ctx.functions.get((domain, proto.op_type, proto.overload))
    if function is not None:
        return Step(node, body_operator(_call(function, attributes, scope, ctx)), False)
    if version < 1:
        ctx.problems.append(
            f"{label} of node {scope.name!r}: the model imports opset "
            f"{scope.opsets.get(domain, 'none')} of the domain {domain or 'ai.onnx'!r}"
        )
        return None
    operator: Operator | None = OPERATORS.get(label)
    if operator is not None:
        graphs = any(isinstance(v, Graph) for v in attributes.values())
        return Step(node, operator, not graphs and label not in UNFOLDED)
    operator = _expanded(proto, node, scope, ctx)
    if operator is not None:
        return Step(node, operator, False)
    hint = nearest(label, OPERATORS) if not domain else ""
    ctx.problems.append(f"{label} (opset {version}) of node {scope.name!r}.{hint}")
    return None


def _expanded(proto: Any, node: Node, scope: Scope, ctx: Decoding) -> Operator | None:
    schema = find_schema(node.op, node.domain, node.version)
    if schema is None:
        return None
    defaults = {
        name: decode_attribute(attribute.default_value, scope, ctx)
        for name, attribute in schema.attributes.items()
        if attribute.default_value.name
    }
    inner = Scope(scope.name, scope.opsets, trains=False, depth=scope.depth + 1)

    def expand(function: Any, bound: Mapping[str, Any]) -> tuple[Graph, list[str]]:
        own = Decoding(ctx.folder)
        return decode_function(function, bound, inner, own), own.problems

    return schema_operator(schema, proto, {**defaults, **node.attributes}, expand, ctx.problems)


def _call(function: Any, attributes: Mapping[str, Any], scope: Scope, ctx: Decoding) -> Graph:
    ctx.left -= len(function.node)
    if ctx.left < 0:
        raise DataError(f"the model's functions expand to more than {_EXPANDED_NODES} nodes")
    defaults = {a.name: decode_attribute(a, scope, ctx) for a in function.attribute_proto}
    # Named by the function, not by its call: all calls share the body's parameters.
    name = "/".join(part for part in (function.domain, function.name, function.overload) if part)
    inner = Scope(name, scope.opsets, trains=scope.trains, depth=scope.depth)
    return decode_function(function, {**defaults, **attributes}, inner, ctx)


def decode_attributes(proto: Any, scope: Scope, ctx: Decoding) -> dict[str, Any]:
    """Decode a node's attributes; a function's own attributes take their values from the call."""
    found = {}
    for attribute in proto.attribute:
        if attribute.ref_attr_name:
            if attribute.ref_attr_name in (scope.bound or {}):
                found[attribute.name] = (scope.bound or {})[attribute.ref_attr_name]
        else:
            found[attribute.name] = decode_attribute(attribute, scope, ctx)
    return found


def decode_attribute(attribute: Any, scope: Scope, ctx: Decoding) -> Any:
    """Decode one AttributeProto's value."""
    what = f"attribute {attribute.name!r} of node {scope.name!r}"
    match _KINDS.get(attribute.type, _kind(attribute)):
        case "f":
            return attribute.f
        case "i":
            return attribute.i
        case "s":
            return _text(attribute.s)
        case "t":
            return decode_tensor(attribute.t, ctx.folder, what)
        case "g":
            return _subgraph(attribute.g, attribute.name, scope, ctx)
        case "floats":
            return list(attribute.floats)
        case "ints":
            return list(attribute.ints)
        case "strings":
            return [_text(s) for s in attribute.strings]
        case "tensors":
            return [decode_tensor(t, ctx.folder, what) for t in attribute.tensors]
        case "graphs":
            return [_subgraph(g, attribute.name, scope, ctx) for g in attribute.graphs]
        case "sparse_tensor":
            return decode_sparse(attribute.sparse_tensor, ctx.folder, what)
        case "tp":
            return attribute.tp
    ctx.problems.append(f"{what} has the type {attribute.type}")
    return None


_KINDS = {
    1: "f", 2: "i", 3: "s", 4: "t", 5: "g", 6: "floats", 7: "ints", 8: "strings",
    9: "tensors", 10: "graphs", 11: "sparse_tensor", 13: "tp",
}  # fmt: skip


def _kind(attribute: Any) -> str | None:
    """Return which value an attribute has that does not tell its type, as old files do not."""
    for name in ("f", "i", "s", "t", "g"):
        if attribute.HasField(name):
            return name
    return next((n for n in ("floats", "ints", "strings") if len(getattr(attribute, n))), None)


def _subgraph(proto: Any, name: str, scope: Scope, ctx: Decoding) -> Graph:
    inner = replace(scope, name=f"{scope.name}/{name}", depth=scope.depth + 1)
    return decode_graph(proto, inner, ctx)


def _text(value: bytes) -> str:
    return value.decode(errors="surrogateescape")


def _constant(attributes: Mapping[str, Any], what: str) -> np.ndarray:
    dtypes = {"float": np.float32, "int": np.int64, "string": object}
    for name, value in attributes.items():
        if name in ("value", "sparse_value") and isinstance(value, np.ndarray):
            return value
        dtype = dtypes.get(name.removeprefix("value_").removesuffix("s"))
        if name.startswith("value_") and dtype is not None:
            return np.asarray(value, dtype)
    raise DataError(f"the Constant {what!r} has no value")


def _place(
    name: str,
    array: np.ndarray,
    scope: Scope,
    ctx: Decoding,
    constants: dict[str, np.ndarray],
    params: dict[str, str],
    constant: bool,
    bound: bool = False,
) -> None:
    _check_text(name)
    if ctx.named is not None:
        trained = not scope.name and name in ctx.named
    else:
        trained = scope.trains and is_parameter(name, array, scope.shapes, constant)
    if trained and not bound:
        params[name] = ctx.add_parameter(scope.name, name, array)
    else:
        constants[name] = array


def _check_text(name: Any) -> None:
    if not isinstance(name, str):
        raise DataError(f"the model calls a value {name!r}, which is no UTF-8")


def _check_made(names: Sequence[str], known: Any, scope: Scope) -> None:
    missing = sorted({name for name in names if name not in known})
    if missing:
        raise DataError(
            f"{scope.name or 'the graph'!r} uses {', '.join(map(repr, missing[:10]))}, which nothing "
            "before it makes"
        )


def _check_outputs(proto: Any, count: int, scope: Scope) -> None:
    if len(proto.output) != count:
        raise DataError(f"node {scope.name!r} has {len(proto.output)} outputs instead of {count}")


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _nowhere(*args: Any, **options: Any) -> Any:
    raise RuntimeError("a node that is not running has nothing around it")


_NOWHERE = Outer(_nowhere, _nowhere)
