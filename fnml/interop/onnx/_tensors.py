"""The arrays of a model file, with every size checked before it is believed."""

import math
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fnml.core import DataError
from fnml.interop.onnx._dtypes import DTYPES

# A sparse array names its own size: what it may take when made dense.
_DENSE_BYTES = 2**31
_BITS = {21: 4, 22: 4, 23: 4, 25: 2, 26: 2, 27: 6, 28: 6}
_EXTERNAL = 1


def decode_tensor(proto: Any, folder: Path | None, what: str) -> np.ndarray:
    """Return a TensorProto's array; strings as an array of ``str`` objects.

    Args:
      proto: the TensorProto.
      folder: where files with external data lie; ``None`` refuses them.
      what: names the array in messages.

    Raises:
      DataError: its type is unknown, its size is not that of its data, or its file is missing, too
        short, or outside the folder.
    """
    dtype = DTYPES.get(proto.data_type)
    if dtype is None:
        raise DataError(f"{what}: has element type {proto.data_type}, which ONNX does not have")
    shape = tuple(proto.dims)
    if any(size < 0 for size in shape):
        raise DataError(f"{what}: has the shape {list(shape)}")
    bits = _BITS.get(proto.data_type, 8 * dtype.itemsize)
    count = math.prod(shape)
    size = -(-count * bits // 8)
    if proto.data_location == _EXTERNAL:
        return _unpack(_external(proto, folder, size, what), dtype, bits, shape)
    if proto.HasField("raw_data") and dtype != object:
        if len(proto.raw_data) != size:
            raise DataError(
                f"{what}: {dtype}{list(shape)} takes {size} bytes, and the file has "
                f"{len(proto.raw_data)}"
            )
        return _unpack(proto.raw_data, dtype, bits, shape)
    if dtype == object:
        try:
            values = [x.decode() for x in proto.string_data]
            return np.array(values, object).reshape(shape)
        except ValueError as error:
            raise DataError(f"{what}: strings that do not fit {list(shape)}: {error}") from error
    from onnx import numpy_helper

    try:
        array = numpy_helper.to_array(proto)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{what}: data that do not fit {dtype}{list(shape)}: {error}") from error
    if array.shape != shape or array.dtype != dtype:
        raise DataError(
            f"{what}: data of {array.dtype}{list(array.shape)} for {dtype}{list(shape)}"
        )
    return array


def decode_sparse(proto: Any, folder: Path | None, what: str) -> np.ndarray:
    """Return a SparseTensorProto's array, made dense.

    Raises:
      DataError: its indices do not lie in its shape, or it is unreasonably large.
    """
    values = decode_tensor(proto.values, folder, what)
    indices = decode_tensor(proto.indices, folder, f"{what}: indices")
    shape = tuple(proto.dims)
    if any(size < 0 for size in shape) or math.prod(shape) * values.itemsize > _DENSE_BYTES:
        raise DataError(f"{what}: a sparse array of shape {list(shape)}")
    if values.ndim != 1 or indices.dtype != np.int64:
        raise DataError(f"{what}: a sparse array needs a list of values and int64 indices")
    if indices.shape == (*values.shape, len(shape)) and len(shape) > 0:
        inside = bool(((indices >= 0) & (indices < np.array(shape))).all())
        place: Any = tuple(indices.T)
    elif indices.shape == values.shape:
        inside = bool(((indices >= 0) & (indices < math.prod(shape))).all())
        place = np.unravel_index(indices, shape) if inside and shape and indices.size else ()
    else:
        raise DataError(f"{what}: {list(indices.shape)} indices for {list(values.shape)} values")
    if not inside:
        raise DataError(f"{what}: sparse indices outside the shape {list(shape)}")
    dense = np.zeros(shape, values.dtype)
    if values.size:
        dense[place] = values
    return dense


def _unpack(data: Any, dtype: np.dtype[Any], bits: int, shape: tuple[int, ...]) -> np.ndarray:
    if bits >= 8:
        return np.frombuffer(data, dtype).reshape(shape)
    stream = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    codes = stream[: math.prod(shape) * bits].reshape(*shape, bits) << np.arange(bits)
    values = codes.sum(-1).astype(np.int16)
    if dtype.name.startswith("int"):
        return ((values ^ 2 ** (bits - 1)) - 2 ** (bits - 1)).astype(np.int8).astype(dtype)
    return values.astype(np.uint8).astype(dtype) if "uint" in dtype.name else _codes(values, dtype)


def _codes(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    return np.ascontiguousarray(values.astype(np.uint8)).view(dtype)


def _external(proto: Any, folder: Path | None, size: int, what: str) -> bytes:
    entries = {entry.key: entry.value for entry in proto.external_data}
    location = entries.get("location", "")
    if folder is None:
        raise DataError(
            f"{what}: its data lie in the file {location!r}: give from_onnx the path of the model "
            "instead of its contents"
        )
    pure = PurePosixPath(location.replace("\\", "/"))
    if not location or "\0" in location or pure.is_absolute() or ".." in pure.parts:
        raise DataError(f"{what}: its data shall lie in {location!r}, outside the model's folder")
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", size))
    except ValueError as error:
        raise DataError(f"{what}: offset or length of its data is no number") from error
    if length != size or offset < 0:
        raise DataError(f"{what}: needs {size} bytes, and names {length} at {offset}")
    try:
        root = folder.resolve()
        path = (root / pure).resolve()
        if not path.is_relative_to(root) or not path.is_file():
            raise DataError(
                f"{what}: its data shall lie in {location!r}, which is no file in the model's folder"
            )
        if offset + size > path.stat().st_size:
            raise DataError(
                f"{what}: needs {size} bytes from {offset}, and {location!r} has "
                f"{path.stat().st_size}"
            )
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{what}: {location!r} cannot be read: {error}") from error
    if len(data) != size:
        raise DataError(f"{what}: {location!r} ended early")
    return data
