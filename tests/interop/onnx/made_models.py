"""Models of the kinds found in the wild, made with onnx.helper; inputs of a size to run them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def port(name: str, shape: Any, dtype: int = FLOAT) -> Any:
    """Describe an input or output."""
    return helper.make_tensor_value_info(name, dtype, shape)


def tensor(name: str, value: Any, dtype: Any = np.float32) -> Any:
    """Make an initializer."""
    return numpy_helper.from_array(np.asarray(value, dtype), name)


def constant(name: str, value: Any, dtype: Any = np.float32) -> Any:
    """Make a Constant node."""
    return helper.make_node("Constant", [], [name], name=name, value=tensor("", value, dtype))


def model(nodes: Any, inputs: Any, outputs: Any, initializers: Any = (), **options: Any) -> Any:
    """Make a checked model of opset 21."""
    graph = helper.make_graph(list(nodes), "made", inputs, outputs, list(initializers))
    options.setdefault("opset_imports", [helper.make_opsetid("", 21)])
    made = helper.make_model(graph, ir_version=10, **options)
    onnx.checker.check_model(made)
    return made


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    """Draw float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def perceptron() -> tuple[Any, list[np.ndarray]]:
    """Weights in Constants, as many converters write them."""
    nodes = [
        constant("fc1.weight", draw(8, 5, seed=1)),
        constant("fc1.bias", draw(8, seed=2)),
        helper.make_node("Gemm", ["x", "fc1.weight", "fc1.bias"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["a"]),
        constant("fc2.weight", draw(8, 3, seed=3)),
        helper.make_node("MatMul", ["a", "fc2.weight"], ["y"]),
    ]
    made = model(nodes, [port("x", ["batch", 5])], [port("y", ["batch", 3])])
    return made, [draw(4, 5)]


def image_decoder() -> tuple[Any, list[np.ndarray]]:
    """Convolution, batch norm, Resize by scales, ConvTranspose, and a reshape by Shape."""
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("BatchNormalization", ["c", "s", "o", "m", "v"], ["n"]),
        helper.make_node("HardSwish", ["n"], ["a"]),
        helper.make_node("Resize", ["a", "", "scales"], ["r"], mode="linear"),
        helper.make_node("ConvTranspose", ["r", "t"], ["u"], strides=[2, 2], output_padding=[1, 0]),
        helper.make_node("Shape", ["u"], ["size"]),
        helper.make_node("Gather", ["size", "zero"], ["batch"]),
        helper.make_node("Unsqueeze", ["batch", "axis"], ["rows"]),
        helper.make_node("Concat", ["rows", "rest"], ["to"], axis=0),
        helper.make_node("Reshape", ["u", "to"], ["y"]),
    ]
    initializers = [
        tensor("w", draw(4, 3, 3, 3, seed=1)),
        tensor("b", draw(4, seed=2)),
        tensor("s", draw(4, seed=3)),
        tensor("o", draw(4, seed=4)),
        tensor("m", draw(4, seed=5)),
        tensor("v", np.abs(draw(4, seed=6)) + 1),
        tensor("scales", [1, 1, 2, 1.5]),
        tensor("t", draw(4, 2, 3, 3, seed=7)),
        tensor("zero", 0, np.int64),
        tensor("axis", [0], np.int64),
        tensor("rest", [-1], np.int64),
    ]
    x = port("x", ["batch", 3, "height", "width"])
    return model(nodes, [x], [port("y", ["batch", "size"])], initializers), [draw(2, 3, 6, 8)]


def recurrent() -> tuple[Any, list[np.ndarray]]:
    """An LSTM over a sequence of any length, in both directions."""
    nodes = [
        helper.make_node(
            "LSTM", ["x", "W", "R", "B"], ["all", "last"], hidden_size=4, direction="bidirectional"
        ),
        helper.make_node("Transpose", ["last"], ["t"], perm=[1, 0, 2]),
        helper.make_node("Reshape", ["t", "flat"], ["y"]),
    ]
    initializers = [
        tensor("W", draw(2, 16, 3, seed=1)),
        tensor("R", draw(2, 16, 4, seed=2)),
        tensor("B", draw(2, 32, seed=3)),
        tensor("flat", [0, -1], np.int64),
    ]
    made = model(nodes, [port("x", ["time", "batch", 3])], [port("y", ["batch", 8])], initializers)
    return made, [draw(5, 2, 3)]


def nested_branches() -> tuple[Any, list[np.ndarray]]:
    """If in If, with weights as initializers and Constants in the branches."""
    outer, inner = port("deep", ["n", 3]), port("low", ["n", 3])
    yes = helper.make_graph(
        [helper.make_node("MatMul", ["x", "deep.weight"], ["deep"])],
        "yes",
        [],
        [outer],
        [tensor("deep.weight", draw(3, 3, seed=1))],
    )
    no = helper.make_graph(
        [
            constant("shift", draw(3, seed=2)),
            helper.make_node("Add", ["scaled", "shift"], ["shifted"]),
        ],
        "no",
        [],
        [port("shifted", ["n", 3])],
    )
    then = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "gain"], ["scaled"]),
            helper.make_node("If", ["second"], ["low"], then_branch=yes, else_branch=no),
        ],
        "then",
        [],
        [inner],
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["negative"])], "other", [], [port("negative", ["n", 3])]
    )
    nodes = [helper.make_node("If", ["first"], ["y"], then_branch=then, else_branch=other)]
    inputs = [port("x", ["n", 3]), port("first", [], BOOL), port("second", [], BOOL)]
    made = model(nodes, inputs, [port("y", ["n", 3])], [tensor("gain", draw(3, seed=3))])
    return made, [draw(2, 3), np.array(True), np.array(False)]


def loop() -> tuple[Any, list[np.ndarray]]:
    """A Loop whose length and condition are known only when it runs."""
    body = helper.make_graph(
        [
            helper.make_node("Mul", ["state", "rate"], ["next"]),
            helper.make_node("ReduceMax", ["next"], ["largest"], keepdims=0),
            helper.make_node("Less", ["largest", "limit"], ["more"]),
        ],
        "body",
        [port("i", [], INT64), port("keep", [], BOOL), port("state", [3])],
        [port("more", [], BOOL), port("next", [3])],
    )
    nodes = [helper.make_node("Loop", ["count", "", "x"], ["y"], body=body)]
    made = model(
        nodes,
        [port("x", [3]), port("count", [], INT64)],
        [port("y", [3])],
        [tensor("rate", [1.5, 2.0, 0.5]), tensor("limit", 40.0)],
    )
    return made, [np.array([1, 2, 3], np.float32), np.array(7)]


MODELS: dict[str, Callable[[], tuple[Any, list[np.ndarray]]]] = {
    "image_decoder": image_decoder,
    "loop": loop,
    "nested_branches": nested_branches,
    "perceptron": perceptron,
    "recurrent": recurrent,
}
