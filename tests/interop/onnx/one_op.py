"""Run one operator in onnxruntime and in the importer, and compare."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from fnml.interop.onnx import from_onnx
from fnml.interop.onnx._operators import SHAPE_INPUTS


def one_op(
    op: str,
    inputs: Sequence[np.ndarray | None],
    outputs: Sequence[Any] = (np.float32,),
    opset: int = 21,
    domain: str = "",
    **attributes: Any,
) -> onnx.ModelProto:
    """Make a model of one node; an input that is ``None`` is left out, an output likewise."""
    names = [f"i{i}" if x is not None else "" for i, x in enumerate(inputs)]
    wanted = [f"o{i}" if d is not None else "" for i, d in enumerate(outputs)]
    element = helper.np_dtype_to_tensor_dtype
    graph = helper.make_graph(
        [helper.make_node(op, names, wanted, domain=domain, name="node", **attributes)],
        op,
        [
            helper.make_tensor_value_info(n, element(x.dtype), list(x.shape))
            for n, x in zip(names, inputs, strict=True)
            if x is not None
        ],
        [
            helper.make_tensor_value_info(n, element(np.dtype(d)), None)
            for n, d in zip(wanted, outputs, strict=True)
            if n
        ],
    )
    opsets = [helper.make_opsetid(domain, opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def in_onnxruntime(model: onnx.ModelProto, inputs: Sequence[np.ndarray | None]) -> list[Any]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {f"i{i}": x for i, x in enumerate(inputs) if x is not None})


def in_importer(
    model: onnx.ModelProto, inputs: Sequence[np.ndarray | None], compiled: bool = True
) -> list[Any]:
    places = SHAPE_INPUTS.get(model.graph.node[0].op_type, ())
    static = {f"i{i}": x for i, x in enumerate(inputs) if i in places and x is not None}
    imported, params = from_onnx(model, static_inputs=static)
    rest = [x for i, x in enumerate(inputs) if f"i{i}" not in static and x is not None]
    got = (jax.jit(imported.apply) if compiled else imported.apply)(params, *rest)
    return list(got) if isinstance(got, tuple) else [got]


def same(
    op: str,
    inputs: Sequence[np.ndarray | None],
    outputs: Sequence[Any] = (np.float32,),
    opset: int = 21,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    compiled: bool = True,
    **attributes: Any,
) -> list[Any]:
    """Compare the importer, compiled by default, with onnxruntime; return what it computes."""
    model = one_op(op, inputs, outputs, opset, **attributes)
    expected = in_onnxruntime(model, inputs)
    got = in_importer(model, inputs, compiled)
    wide = functools.partial(np.asarray, dtype=np.float64)
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == jax.dtypes.canonicalize_dtype(theirs.dtype)
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(wide(ours), wide(theirs), rtol=rtol, atol=atol)
    return got
