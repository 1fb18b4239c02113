"""Put a built graph together as a model, and have ONNX check it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from fnml.interop.onnx._builder import Builder, code_of, info, prune, reads
from fnml.interop.onnx._write import without_arrays


def finish(
    g: Builder,
    weights: Mapping[str, np.ndarray],
    inputs: Sequence[onnx.ValueInfoProto],
    results: Sequence[str],
    names: Sequence[str],
    shapes: Sequence[Sequence[Any]],
) -> onnx.ModelProto:
    """Return the model of a graph whose nodes are all there.

    Args:
      g: the builder.
      weights: the parameters, by name.
      inputs: the graph's inputs.
      results: the values that it returns.
      names: what they are to be called.
      shapes: of the results.
    """
    made = {out for node in g.nodes for out in node.output}
    called: dict[str, str] = {}
    for result, name in zip(results, names, strict=True):
        if result in made and result not in called:
            called[result] = name
        else:
            # An input, a constant or a value that is returned twice.
            g.rename(result, name)
    for node in g.nodes:
        _rename(node, called)
    nodes = prune(g.nodes, names)
    read = {name for node in nodes for name in reads(node)}
    constants = {name: array for name, array in g.constants.items() if name in read}
    outputs = [
        info(name, g.dtypes[result], shape)
        for result, name, shape in zip(results, names, shapes, strict=True)
    ]
    graph = onnx.helper.make_graph(nodes, "graph", inputs, outputs)
    model = onnx.helper.make_model_gen_version(
        graph, opset_imports=[onnx.helper.make_opsetid("", g.opset)]
    )
    _check(model, weights, constants)
    for name, array in (*weights.items(), *constants.items()):
        _add(model.graph, name, array)
    return model


def _rename(node: onnx.NodeProto, called: Mapping[str, str]) -> None:
    for names in (node.input, node.output):
        for i, name in enumerate(names):
            if name in called:
                names[i] = called[name]
    for attribute in node.attribute:
        for inner in attribute.g.node:
            _rename(inner, called)


def _add(graph: onnx.GraphProto, name: str, array: np.ndarray) -> None:
    # Made in place: what is appended is serialised on the way, which 2 GiB cannot be.
    tensor = graph.initializer.add(name=name, data_type=code_of(array.dtype), dims=array.shape)
    tensor.raw_data = array.tobytes()


def _check(
    model: onnx.ModelProto, weights: Mapping[str, np.ndarray], constants: Mapping[str, np.ndarray]
) -> None:
    """Run ONNX's checker on the model; large arrays stand in as inputs, which it need not read."""
    skeleton = without_arrays(model)
    for name, array in (*weights.items(), *constants.items()):
        if array.nbytes > 4096:
            skeleton.graph.input.append(info(name, array.dtype, array.shape))
        else:
            _add(skeleton.graph, name, array)
    onnx.checker.check_model(skeleton)
