"""Export a function, run the file in onnxruntime, and compare with JAX."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort

from fnml.interop.onnx import from_onnx, to_onnx


def host(tree: Any) -> list[np.ndarray]:
    """Return a tree's leaves on the host, keys as their data."""
    leaves = []
    for x in jax.tree.leaves(tree):
        key = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        x = np.asarray(jax.random.key_data(x) if key else x)
        leaves.append(x)
    return leaves


def check(model: onnx.ModelProto) -> onnx.ModelProto:
    """Have ONNX check a model as strictly as it can."""
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    return model


def run(model: onnx.ModelProto, *args: Any) -> list[np.ndarray]:
    """Run a model in onnxruntime on its CPU provider; bfloat16 goes in and out by float32."""
    outside = onnx.ModelProto()
    outside.CopyFrom(model)
    graph, float32, bfloat16 = outside.graph, onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16
    narrow = [port.type.tensor_type.elem_type == bfloat16 for port in graph.output]
    for place, port in enumerate(graph.input):
        if port.type.tensor_type.elem_type == bfloat16:
            port.type.tensor_type.elem_type = float32
            cast = onnx.helper.make_node("Cast", [f"{port.name}/wide"], [port.name], to=bfloat16)
            graph.node.insert(0, cast)
            graph.input[place].name = f"{port.name}/wide"
    for port in graph.output:
        if port.type.tensor_type.elem_type == bfloat16:
            port.type.tensor_type.elem_type = float32
            cast = onnx.helper.make_node("Cast", [port.name], [f"{port.name}/wide"], to=float32)
            graph.node.append(cast)
            port.name = f"{port.name}/wide"
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        outside.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [port.name for port in session.get_inputs()]
    feed = {
        name: x.astype(np.float32) if x.dtype == ml_dtypes.bfloat16 else x
        for name, x in zip(names, host(args), strict=True)
    }
    results = session.run(None, feed)
    return [
        x.astype(ml_dtypes.bfloat16) if own else x for x, own in zip(results, narrow, strict=True)
    ]


def assert_near(got: Any, expected: Any, tolerance: float, where: str = "") -> None:
    """Compare by relative norm; integers, booleans and what is not finite exactly."""
    assert got.shape == expected.shape, f"{where}: {got.shape} for {expected.shape}"
    assert got.dtype == expected.dtype, f"{where}: {got.dtype} for {expected.dtype}"
    if not jnp.issubdtype(expected.dtype, jnp.floating):
        np.testing.assert_array_equal(got, expected, err_msg=where)
        return
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(got[~finite], expected[~finite], err_msg=where)
    difference = np.linalg.norm(got[finite] - expected[finite])
    scale = np.linalg.norm(expected[finite])
    assert difference <= tolerance * max(scale, 1e-30), f"{where}: {difference / scale}"


def same(
    function: Any,
    *args: Any,
    tolerance: float = 1e-5,
    importer: bool = True,
    params: Any = None,
    **options: Any,
) -> onnx.ModelProto:
    """Export a function and see that onnxruntime and the importer compute what it computes."""
    model = check(to_onnx(function, *args, params=params, **options))
    whole = args if params is None else (params, *args)
    expected = host(jax.jit(function)(*whole))
    for name, got in zip(
        (out.name for out in model.graph.output), _zipped(run(model, *args), expected), strict=True
    ):
        assert_near(*got, tolerance, f"onnxruntime, {name}")
    if importer:
        back, weights = from_onnx(model)
        got_back = jax.jit(back.apply)(weights, *host(args))
        got_back = got_back if isinstance(got_back, tuple) else (got_back,)
        for i, (a, b) in enumerate(_zipped(host(got_back), expected)):
            assert_near(a, b, tolerance, f"from_onnx, output {i}")
    return model


def _zipped(a: list[Any], b: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(a, b, strict=True))


def ops(model: onnx.ModelProto) -> list[str]:
    """Return the operators of the outermost graph."""
    return [node.op_type for node in model.graph.node]
