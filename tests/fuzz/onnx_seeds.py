"""Small ONNX models of many operators, and changes to one field of a model."""

import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fnml.interop.onnx import from_onnx

_FLOAT, _INT64, _BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
_NUMBERS = (0, 1, -1, 2, 3, 7, 64, 255, 2**16, 2**31 - 1, 2**31, -(2**31), 2**40, 2**62, -(2**63))
_OPERATORS = (
    "Add", "Concat", "Conv", "Expand", "Gather", "If", "LSTM", "Loop", "MatMul", "MaxPool", "Pad",
    "Reshape", "Resize", "Scan", "ScatterND", "Slice", "Split", "Tile", "TopK", "Where", "Range",
    "ConstantOfShape", "Attention", "Gelu", "SequenceConstruct", "Identity", "Cast", "Optional",
)  # fmt: skip


def _port(name: str, shape: Any, dtype: int = _FLOAT) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


def _tensor(name: str, value: Any, dtype: Any = np.float32) -> Any:
    return numpy_helper.from_array(np.asarray(value, dtype), name)


def _model(nodes: Any, inputs: Any, outputs: Any, arrays: Any, **options: Any) -> Any:
    graph = helper.make_graph(nodes, "seed", inputs, outputs, arrays)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, ir_version=10, opset_imports=opsets, **options)


def _image() -> Any:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("MaxPool", ["c"], ["p"], kernel_shape=[2, 2], ceil_mode=1),
        helper.make_node("Resize", ["p", "", "scales"], ["r"], mode="linear"),
        helper.make_node("ConvTranspose", ["r", "t"], ["u"], strides=[2, 2]),
        helper.make_node("Shape", ["u"], ["s"]),
        helper.make_node("Slice", ["s", "zero", "one"], ["n"]),
        helper.make_node("Concat", ["n", "rest"], ["to"], axis=0),
        helper.make_node("Reshape", ["u", "to"], ["y"]),
    ]
    arrays = [
        _tensor("w", np.ones((2, 1, 3, 3))),
        _tensor("scales", [1, 1, 2, 2]),
        _tensor("t", np.ones((2, 1, 2, 2))),
        _tensor("zero", [0], np.int64),
        _tensor("one", [1], np.int64),
        _tensor("rest", [-1], np.int64),
    ]
    return _model(nodes, [_port("x", ["n", 1, 6, 6])], [_port("y", ["n", "m"])], arrays)


def _control() -> Any:
    body = helper.make_graph(
        [helper.make_node("Add", ["s", "v"], ["t"]), helper.make_node("Identity", ["k"], ["l"])],
        "body",
        [_port("i", [], _INT64), _port("k", [], _BOOL), _port("s", [3])],
        [_port("l", [], _BOOL), _port("t", [3])],
    )
    row = helper.make_graph(
        [helper.make_node("Mul", ["a", "b"], ["c"]), helper.make_node("Neg", ["c"], ["d"])],
        "row",
        [_port("a", [3]), _port("b", [3])],
        [_port("c", [3]), _port("d", [3])],
    )
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(op, ["z"], [name])], name, [], [_port(name, [3])]
        )
        for name, op in (("then", "Relu"), ("else", "Neg"))
    }
    nodes = [
        helper.make_node("Loop", ["count", "", "x"], ["z"], body=body),
        helper.make_node("If", ["flag"], ["f"], **branches),
        helper.make_node("Scan", ["f", "rows"], ["g", "h"], body=row, num_scan_inputs=1),
        helper.make_node("Twice", ["g"], ["y"], domain="own", times=2.0),
    ]
    twice = [helper.make_node("LeakyRelu", ["p"], ["q"])]
    twice[0].attribute.append(onnx.AttributeProto(name="alpha", type=1, ref_attr_name="times"))
    opsets = [helper.make_opsetid("", 21)]
    function = helper.make_function("own", "Twice", ["p"], ["q"], twice, opsets, ["times"])
    arrays = [
        _tensor("v", [1, 2, 3]),
        _tensor("count", 3, np.int64),
        _tensor("rows", np.ones((2, 3))),
    ]
    inputs = [_port("x", [3]), _port("flag", [], _BOOL)]
    outputs = [_port("y", [3]), _port("h", [2, 3])]
    return _model(nodes, inputs, outputs, arrays, functions=[function])


def _sequence() -> Any:
    nodes = [
        helper.make_node("Gather", ["table", "x"], ["e"]),
        helper.make_node("LSTM", ["e", "W", "R"], ["all", "last"], hidden_size=2),
        helper.make_node("Squeeze", ["last", "zero"], ["h"]),
        helper.make_node("LayerNormalization", ["h", "scale"], ["n"]),
        helper.make_node("TopK", ["n", "k"], ["v", "i"]),
        helper.make_node("Cast", ["i"], ["f"], to=_FLOAT),
        helper.make_node("Einsum", ["v", "f"], ["y"], equation="bi,bj->bij"),
    ]
    arrays = [
        _tensor("table", np.ones((5, 3))),
        _tensor("W", np.ones((1, 8, 3))),
        _tensor("R", np.ones((1, 8, 2))),
        _tensor("zero", [0], np.int64),
        _tensor("scale", [1, 2]),
        _tensor("k", [1], np.int64),
    ]
    return _model(nodes, [_port("x", [4, 2], _INT64)], [_port("y", [2, 1, 1])], arrays)


def seeds() -> list[tuple[str, dict[str, bytes]]]:
    """Return files of models, one of them with external data."""
    files = {
        f"{make.__name__[1:]}.onnx": {f"{make.__name__[1:]}.onnx": make().SerializeToString()}
        for make in (_image, _control, _sequence)
    }
    outside = _image()
    weight = outside.graph.initializer[0]
    data = weight.raw_data
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("offset", "0"), ("length", str(len(data)))):
        weight.external_data.add(key=key, value=value)
    files["outside.onnx"] = {"outside.onnx": outside.SerializeToString(), "w.bin": data}
    return list(files.items())


def field(rng: random.Random, data: bytes) -> bytes:
    """Change, remove or double a field of the model that is no message."""
    model = onnx.ModelProto()
    model.ParseFromString(data)
    places = list(_places(model))
    message, kind = rng.choice(places)
    value = getattr(message, kind.name)
    if _is_repeated(value):
        action = rng.randrange(4)
        if action == 0 and len(value):
            del value[rng.randrange(len(value))]
        elif action == 1 and len(value):
            value.append(rng.choice(list(value)))
        elif kind.message_type is None and len(value):
            value[rng.randrange(len(value))] = _value(rng, kind, model)
    elif kind.message_type is not None or rng.random() < 0.15:
        message.ClearField(kind.name)
    else:
        setattr(message, kind.name, _value(rng, kind, model))
    return model.SerializeToString()


def _is_repeated(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, str | bytes)


def _places(message: Any) -> Any:
    for kind, value in message.ListFields():
        yield message, kind
        if kind.message_type is not None:
            for item in value if _is_repeated(value) else [value]:
                yield from _places(item)


def _value(rng: random.Random, kind: Any, model: Any) -> Any:
    names = [name for node in model.graph.node for name in (*node.input, *node.output)]
    if kind.enum_type is not None:
        return rng.choice(list(kind.enum_type.values_by_number))
    if kind.cpp_type == kind.CPPTYPE_STRING:
        text = rng.choice((*names, *_OPERATORS, "", "..", "/etc/passwd", "axis", "x" * 200))
        return text.encode() if kind.type == kind.TYPE_BYTES else text
    if kind.cpp_type in (kind.CPPTYPE_FLOAT, kind.CPPTYPE_DOUBLE):
        return rng.choice((0.0, -1.0, 1e30, float("inf"), float("nan"), 0.5))
    bits = 31 if kind.cpp_type in (kind.CPPTYPE_INT32, kind.CPPTYPE_UINT32) else 63
    low = -(2**bits) if kind.cpp_type in (kind.CPPTYPE_INT32, kind.CPPTYPE_INT64) else 0
    return rng.choice([n for n in _NUMBERS if low <= n < 2**bits])


def read(folder: Path, name: str) -> None:
    """Import the folder's model and trace it on inputs of the sizes that it names."""
    model, params = from_onnx(folder / name)
    inputs = [
        jax.ShapeDtypeStruct(
            tuple(size if isinstance(size, int) else 2 for size in port.shape or ()),
            jax.dtypes.canonicalize_dtype(port.dtype or jnp.float32),
        )
        for port in model.apply.inputs
    ]
    jax.eval_shape(model.apply, params, *inputs)
