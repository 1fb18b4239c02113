"""Write a model to disk, whole or not at all; its arrays beside it if one file cannot hold them."""

import math
from pathlib import Path
from typing import Any, BinaryIO

import onnx

from fnml.core import DataError, atomic_path
from fnml.interop.onnx._dtypes import DTYPES

# A protocol buffer holds less than 2 GiB; the nodes take a part of it.
_MOST_BYTES = 2**31 - 2**26
# Smaller arrays stay in the model: shapes and axes are read without the other file.
_LEAST_BYTES = 1024
# What readers that map the file into memory like best.
_ALIGNMENT = 4096


def write_model(model: onnx.ModelProto, path: Path, external: bool | None) -> None:
    """Write ``model`` to ``path``, and with ``external`` its arrays to ``path`` + ``.data``.

    Args:
      model: a model that holds all of its arrays; it is not changed.
      path: the file.
      external: ``None`` to decide by size.

    Raises:
      DataError: the model is too large for one file, and ``external`` is ``False``.
      OSError: the directory is missing or not writable, or the disk is full.
    """
    size = sum(map(_nbytes, model.graph.initializer))
    if external is None:
        external = size > _MOST_BYTES
    if size > _MOST_BYTES and not external:
        raise DataError(
            f"{path}: the arrays have {size} bytes, and an ONNX file holds less than 2 GiB: leave "
            "external_data out, or set it to True"
        )
    if not external:
        with atomic_path(path) as temporary:
            temporary.write_bytes(model.SerializeToString())
        return
    data = path.with_name(f"{path.name}.data")
    with atomic_path(data) as arrays, atomic_path(path) as temporary:
        with arrays.open("wb") as file:
            outside = _moved_out(model, file, data.name)
            written = file.tell()
        if arrays.stat().st_size != written:
            raise DataError(f"{data}: {arrays.stat().st_size} bytes on disk, expected {written}")
        temporary.write_bytes(outside.SerializeToString())


def _moved_out(model: onnx.ModelProto, file: BinaryIO, name: str) -> onnx.ModelProto:
    """Write the arrays to ``file``; return the model that looks for them in ``name``."""
    kept = list(model.graph.initializer)
    result = without_arrays(model)
    for tensor in kept:
        if _nbytes(tensor) < _LEAST_BYTES:
            result.graph.initializer.append(tensor)
            continue
        file.write(b"\0" * (-file.tell() % _ALIGNMENT))
        moved = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        moved.data_location = onnx.TensorProto.EXTERNAL
        entries: dict[str, Any] = {
            "location": name,
            "offset": file.tell(),
            "length": _nbytes(tensor),
        }
        for key, value in entries.items():
            moved.external_data.add(key=key, value=str(value))
        file.write(tensor.raw_data)
        result.graph.initializer.append(moved)
    return result


def _nbytes(tensor: onnx.TensorProto) -> int:
    # The length of raw_data would be asked of a copy of it.
    return math.prod(tensor.dims) * DTYPES[tensor.data_type].itemsize


def without_arrays(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of the model that has no initializers."""
    result, graph = onnx.ModelProto(), onnx.GraphProto()
    for field, value in model.ListFields():
        if field.name == "graph":
            continue
        if isinstance(value, int | str | bytes):
            setattr(result, field.name, value)
        else:
            getattr(result, field.name).extend(value)
    for field, value in model.graph.ListFields():
        if field.name == "initializer":
            continue
        if isinstance(value, int | str | bytes):
            setattr(graph, field.name, value)
        else:
            getattr(graph, field.name).extend(value)
    result.graph.CopyFrom(graph)
    return result
