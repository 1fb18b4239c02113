"""Model files as trainable pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnml.core import ConfigError, DataError, FnmlError, Model, Param, ShapeError, nearest, require
from fnml.interop.onnx._decode import Decoding, Scope, decode_graph
from fnml.interop.onnx._dtypes import canonical, narrow
from fnml.interop.onnx._errors import UnsupportedError
from fnml.interop.onnx._names import listed_parameters, nest, shape_names, tree_paths
from fnml.interop.onnx._node import Graph, Port
from fnml.interop.onnx._run import Call, run_graph
from fnml.interop.onnx._static import put

PyTree = Any
# What a protocol buffer can hold.
_FILE_BYTES = 2**31


@dataclass(frozen=True, eq=False)
class OnnxApply:
    """The ``apply`` of an imported model: ``apply(params, *inputs, key=None) -> outputs``.

    Attributes:
      inputs: what ``apply`` takes after the parameters, in order.
      outputs: what it returns: one array, or a tuple where the file has several.
      graph: the decoded graph.
      paths: where each parameter stands in the tree, by its name in the file.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    graph: Graph
    paths: Mapping[str, tuple[str, ...]]

    def __call__(self, params: PyTree, *inputs: Any, key: jax.Array | None = None) -> Any:
        arrays = _read(params, self.paths)
        values = check_inputs(self.inputs, inputs)
        results = run_graph(self.graph, values, Call(arrays, key))
        results = tuple(map(_leave, results))
        return results[0] if len(results) == 1 else results


def from_onnx(
    model: Any, static_inputs: Mapping[str, Any] | None = None
) -> tuple[Model, dict[str, Any]]:
    """Make a model of an ONNX file: a pure function, and the parameters that the file holds.

    ``model.apply(params, *inputs, key=None)`` takes the graph's inputs in the order of the file and
    returns its output, or a tuple of them. It can be compiled, differentiated and vmapped.
    ``model.apply.inputs`` and ``.outputs`` tell names, dtypes and (symbolic) dimensions.

    Parameters are the float initializers of rank 1 and more, the float Constants of more than one
    number and the kernels of layers that ``ConstantOfShape`` fills, also those in subgraphs and
    functions; sizes and scales that decide shapes are not.
    They form nested dicts: a name is split at ``/`` (else at ``.``) where that is unambiguous. All
    else of the file is constant: what follows from constants and from shapes is computed while
    tracing.

    Laws: ``from_onnx(to_onnx(f, ..., params=p))`` computes what ``f`` does, from equal parameters
    of equal paths. ``apply`` is pure: random operators draw from ``key`` and the node's name.

    Without ``jax.enable_x64(True)`` JAX computes the file's int64, uint64 and float64 in 32 bit;
    shapes are computed in 64 bit always.

    Args:
      model: a path, the bytes of a file, or an ``onnx.ModelProto``, which is not changed.
      static_inputs: values of graph inputs that are fixed, by name: ``apply`` does not take these.
        An input from which shapes are computed has to be fixed for ``jit``.

    Raises:
      DataError: the file is damaged, or names data outside its folder.
      UnsupportedError: operators, types or opsets are not supported; all are listed, with nodes.
      ConfigError: ``static_inputs`` names no input.
      ShapeError: a static input does not fit the graph; (when called) inputs or parameters do not,
        all mismatches listed; an input decides a shape, and is traced.

    >>> from onnx import helper, numpy_helper, TensorProto
    >>> kernel = numpy_helper.from_array(np.ones((2, 3), np.float32), "dense.kernel")
    >>> ports = [
    ...     helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
    ...     for name, size in (("x", 2), ("y", 3))
    ... ]
    >>> node = helper.make_node("MatMul", ["x", "dense.kernel"], ["y"])
    >>> graph = helper.make_graph([node], "line", ports[:1], ports[1:], [kernel])
    >>> model, params = from_onnx(helper.make_model(graph))
    >>> jax.tree.map(jnp.shape, params)
    {'dense': {'kernel': (2, 3)}}
    >>> model.apply(params, jnp.ones((4, 2))).shape
    (4, 3)
    >>> model.apply.inputs[0].shape
    ('batch', 2)
    """
    onnx = require("onnx", extra="onnx")
    proto, folder = _load(onnx, model)
    graph, ctx = _decode(proto, folder)
    if ctx.problems:
        listed = "\n".join(f"  {line}" for line in dict.fromkeys(ctx.problems))
        raise UnsupportedError(f"the model uses what from_onnx does not support:\n{listed}")
    fixed = _fixed(graph, static_inputs or {})
    inputs = tuple(port for port in graph.inputs if port.name not in fixed)
    graph = graph._replace(inputs=inputs, constants={**graph.constants, **fixed})
    paths = tree_paths(ctx.arrays)
    arrays = {
        path: put(narrow(ctx.arrays[name], f"parameter {name!r}")) for name, path in paths.items()
    }
    spec = {path: _describe(array) for path, array in arrays.items()}
    return Model(nest(spec), OnnxApply(inputs, graph.outputs, graph, paths)), nest(arrays)


def _decode(proto: Any, folder: Path | None) -> tuple[Graph, Decoding]:
    try:
        functions = {(_ai(f.domain), f.name, f.overload): f for f in proto.functions}
        ctx = Decoding(folder, functions, named=listed_parameters(proto.metadata_props))
        opsets = {_ai(o.domain): o.version for o in proto.opset_import} or {"": 1}
        scope = Scope("", opsets, shapes=shape_names(proto.graph.node))
        graph = decode_graph(proto.graph, scope, ctx)
        return graph, ctx
    except FnmlError:
        raise
    except (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        # A text that is no UTF-8 comes as bytes, and meets what expects a string.
        raise DataError(f"the model is damaged: {type(error).__name__}: {error}") from error


def check_inputs(ports: Sequence[Port], inputs: Sequence[Any]) -> list[Any]:
    """Return a call's inputs as JAX arrays, if they fit their descriptions.

    Raises:
      ShapeError: they do not; all mismatches are listed.
    """
    if len(inputs) != len(ports):
        names = ", ".join(port.name for port in ports)
        raise ShapeError(f"the model takes {len(ports)} inputs ({names}), and got {len(inputs)}")
    faults: list[str] = []
    values = [_enter(port, value, faults) for port, value in zip(ports, inputs, strict=True)]
    if faults:
        raise ShapeError("these inputs are not the model's:\n" + "\n".join(faults))
    return values


def _enter(port: Port, value: Any, faults: list[str]) -> Any:
    if isinstance(value, list | tuple) and port.kind != "tensor":
        return [_enter(port._replace(kind="unknown"), v, faults) for v in value]
    if value is None and port.kind == "optional":
        return None
    if not isinstance(value, jax.Array):
        value = np.asarray(value)
        if value.dtype == object or value.dtype.kind in "SU":
            if port.dtype != object:
                faults.append(f"{port.name}: expected {_wanted(port)}, got strings")
            return value.astype(object)
        value = put(narrow(value, f"input {port.name!r}"))
    if not _fits(port, value.dtype, value.shape):
        got = f"{value.dtype}{list(value.shape)}"
        faults.append(f"{port.name}: expected {_wanted(port)}, got {got}")
    return value


def _fits(port: Port, dtype: Any, shape: tuple[int, ...]) -> bool:
    if port.dtype is not None and (
        port.dtype == object or canonical(port.dtype) != canonical(dtype)
    ):
        return False
    # Names of dimensions are kept for reading: files repeat them for sizes that differ.
    return port.shape is None or (
        len(port.shape) == len(shape)
        and all(not isinstance(a, int) or a == b for a, b in zip(port.shape, shape, strict=True))
    )


def _wanted(port: Port) -> str:
    dtype = "any type" if port.dtype is None else str(port.dtype)
    if port.shape is None:
        return f"{dtype} of any shape"
    return f"{dtype}[{', '.join('?' if d is None else str(d) for d in port.shape)}]"


def _leave(value: Any) -> Any:
    if isinstance(value, list):
        return [_leave(v) for v in value]
    if isinstance(value, np.ndarray) and value.dtype != object:
        return put(narrow(value, "an output"))
    return value


def _fixed(graph: Graph, values: Mapping[str, Any]) -> dict[str, Any]:
    ports = {port.name: port for port in graph.inputs}
    faults: list[str] = []
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in ports:
            raise ConfigError(
                f"static_inputs names {name!r}, and the model takes {', '.join(ports) or 'nothing'}."
                f"{nearest(name, ports)}"
            )
        found[name] = _fix(ports[name], value, faults)
    if faults:
        raise ShapeError("these static inputs are not the model's:\n" + "\n".join(faults))
    return found


def _fix(port: Port, value: Any, faults: list[str]) -> Any:
    if value is None and port.kind == "optional":
        return None
    if port.kind != "tensor" and isinstance(value, list | tuple):
        return [_fix(port._replace(kind="unknown"), v, faults) for v in value]
    array = np.asarray(value)
    if port.dtype is not None and array.dtype != port.dtype:
        same_kind = array.size == 0 or np.can_cast(array.dtype, port.dtype, "same_kind")
        if port.dtype == object or (array.dtype != object and same_kind):
            array = array.astype(port.dtype)
        else:
            faults.append(f"{port.name}: expected {_wanted(port)}, got {array.dtype}")
            return array
    if not _fits(port._replace(dtype=None), array.dtype, array.shape):
        got = f"{array.dtype}{list(array.shape)}"
        faults.append(f"{port.name}: expected {_wanted(port)}, got {got}")
    return array


def _load(onnx: Any, model: Any) -> tuple[Any, Path | None]:
    if isinstance(model, onnx.ModelProto):
        return model, None
    folder = None
    if isinstance(model, bytes):
        data = model
    elif isinstance(model, str | Path):
        path = Path(model)
        folder = path.parent
        try:
            if path.stat().st_size >= _FILE_BYTES:
                raise DataError(f"{path}: larger than the 2 GiB that a protocol buffer can be")
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    else:
        raise ConfigError(
            f"from_onnx takes a path, bytes or an onnx.ModelProto, got {type(model).__name__}"
        )
    proto = onnx.ModelProto()
    where = "these bytes are" if folder is None else f"{model}:"
    try:
        proto.ParseFromString(data)
    except Exception as error:
        # The parser's own class of error depends on which protobuf is installed.
        raise DataError(f"{where} no ONNX model: {error}") from error
    if not proto.HasField("graph"):
        raise DataError(f"{where} no ONNX model: it has no graph")
    return proto, folder


def _read(params: PyTree, paths: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Return the parameters by the name that graphs call them by."""
    found, missing = {}, []
    for name, path in paths.items():
        here = params
        for part in path:
            here = here.get(part) if isinstance(here, Mapping) else None
        if here is None or isinstance(here, Mapping):
            missing.append("/".join(path))
        else:
            found[name] = here if isinstance(here, jax.Array) else jnp.asarray(here)
    if missing:
        raise ShapeError(f"these parameters are not the model's: without {', '.join(missing)}")
    return found


def _describe(array: jax.Array) -> Param:
    init = jax.nn.initializers.normal(0.02) if array.ndim > 1 else jax.nn.initializers.zeros
    return Param(array.shape, (None,) * array.ndim, init, array.dtype)


def _ai(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain
