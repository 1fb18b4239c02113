"""Operators without a function of their own here, expanded as ONNX defines them."""

from collections.abc import Callable, Mapping
from typing import Any

from fnml.core import DataError, ShapeError
from fnml.interop.onnx._dtypes import DTYPES
from fnml.interop.onnx._errors import UnsupportedError
from fnml.interop.onnx._node import Graph, Node, Operator
from fnml.interop.onnx._run import body_operator
from fnml.interop.onnx._static import where_is

# expand(function, attributes) -> the decoded body, and what is unsupported in it
Expand = Callable[[Any, Mapping[str, Any]], tuple[Graph, list[str]]]

_NUMBERS = {dtype: number for number, dtype in DTYPES.items()}


def find_schema(op: str, domain: str, version: int) -> Any:
    """Return ONNX's definition of an operator as of an opset, the newest one at the latest."""
    import onnx

    try:
        return onnx.defs.get_schema(op, min(version, 2**31 - 1), domain)
    except onnx.defs.SchemaError:
        return None


def schema_operator(
    schema: Any, proto: Any, attributes: Mapping[str, Any], expand: Expand, problems: list[str]
) -> Operator | None:
    """Return an operator made of the function body in a schema, if there is one.

    A body that depends on the inputs' types is built when they are known, at each trace.

    Args:
      schema: ONNX's definition.
      proto: the node.
      attributes: the node's, with the schema's defaults.
      expand: decodes a body.
      problems: what is unsupported in a body is added to these.
    """
    if schema.has_function:
        graph, found = expand(schema.function_body, attributes)
        problems += found
        return body_operator(graph)
    if schema.has_context_dependent_function:
        return _contextual(schema, proto.SerializeToString(), attributes, expand)
    return None


def _contextual(
    schema: Any, proto: bytes, attributes: Mapping[str, Any], expand: Expand
) -> Operator:
    import onnx

    def run(node: Node, *inputs: Any) -> Any:
        types = [_type(value).SerializeToString() for value in inputs]
        version = min(node.version, schema.since_version)
        text = schema.get_context_dependent_function_with_opset_version(version, proto, types)
        if not text:
            raise ShapeError(f"{where_is(node)}: ONNX defines it only for other types of inputs")
        function = onnx.FunctionProto()
        try:
            function.ParseFromString(text)
        except Exception as error:
            raise DataError(f"{where_is(node)}: its definition cannot be read: {error}") from error
        graph, problems = expand(function, attributes)
        if problems:
            raise UnsupportedError(f"{where_is(node)} uses " + "; ".join(problems))
        return body_operator(graph)(node, *inputs)

    return run


def _type(value: Any) -> Any:
    import onnx

    if value is None:
        return onnx.TypeProto()
    if isinstance(value, list):
        return onnx.helper.make_sequence_type_proto(_type(value[0] if value else None))
    return onnx.helper.make_tensor_type_proto(_NUMBERS[value.dtype], value.shape)
