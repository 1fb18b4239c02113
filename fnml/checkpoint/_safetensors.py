"""Parameters in one file that other programs read."""

import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fnml.checkpoint._weights import fit, host_arrays, reading, written
from fnml.core import CheckpointError

PyTree = Any

_DTYPES = {
    "BOOL": "bool",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
# The limit of the reference implementation.
_HEADER_LIMIT = 100_000_000


def save_safetensors(
    path: str | os.PathLike[str], params: PyTree, metadata: Mapping[str, str] | None = None
) -> None:
    """Write parameters under their paths as a safetensors file, atomically.

    Args:
      path: the file; an old one is replaced.
      params: a tree of arrays.
      metadata: texts for the file's header.

    Law: ``load_safetensors(path, params)`` has the bits of ``params``.

    Raises:
      ShapeError: leaves that the format cannot hold (typed keys, 4- and 8-bit floats); all listed.
      CheckpointError: the file cannot be written; an old one is kept.

    See https://huggingface.co/docs/safetensors for the format.

    >>> import tempfile, pathlib, jax.numpy as jnp
    >>> path = pathlib.Path(tempfile.mkdtemp(), "model.safetensors")
    >>> save_safetensors(path, {"w": jnp.arange(3)}, {"license": "CC0-1.0"})
    >>> load_safetensors(path)["w"].tolist()
    [0, 1, 2]
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = host_arrays(params, set(_DTYPES.values()), "safetensors")
    with written(path) as temporary:
        try:
            save_file(arrays, temporary, metadata=dict(metadata or {}))
        except SafetensorError as error:
            raise CheckpointError(f"{path} cannot be written: {error}") from error


def load_safetensors(path: str | os.PathLike[str], target: PyTree | None = None) -> Any:
    """Read a safetensors file, memory-mapped.

    Args:
      path: the file. It may be replaced while its arrays are in use, but not overwritten.
      target: a tree of arrays or :class:`jax.ShapeDtypeStruct` with the file's paths, shapes and
        dtypes; leaves with a sharding are put onto it.

    Returns:
      With a target, a tree like it of JAX arrays; without, read-only NumPy arrays by path that are
      views of the file: their bytes are read when they are used.

    Raises:
      CheckpointError: the file is missing or damaged, or differs from ``target`` (all listed).
    """
    path = Path(path)
    with reading(path):
        arrays = _read(path)
    return fit(path, arrays, target)


def _read(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise ValueError(f"it has {size:,} bytes, and claims a header of {length:,}")
        header = _parse(file.read(length))
        spans = _check(header, size - 8 - length)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return {
        name: _view(mapped, dtype, shape, 8 + length + start)
        for name, (dtype, shape, start) in spans.items()
    }


def _view(mapped: mmap.mmap, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
    count = math.prod(shape)
    if not count:
        return np.empty(shape, dtype)
    array = np.frombuffer(mapped, dtype, count, offset).reshape(shape)
    # Files that pack odd sizes exist, and little reads an array that is not aligned.
    return array if array.flags.aligned else array.copy()


def _parse(text: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("its header has one name twice")
        return found

    return json.loads(text, object_pairs_hook=unique)


def _check(header: Any, size: int) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
    """Return dtype, shape and offset of each array: one after the other, they fill the file."""
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or any(type(text) is not str for text in metadata.values()):
        raise ValueError("its header is no JSON object, or has metadata that are no texts")
    found, spans = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name!r} is described by {str(entry)[:200]!r}")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in _DTYPES:
            raise ValueError(f"{name!r} has dtype {code!r}; those that are read: {list(_DTYPES)}")
        if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
            raise ValueError(f"{name!r} has shape {shape!r} and offsets {offsets!r}")
        dtype, (start, stop) = jnp.dtype(_DTYPES[code]), offsets
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{name!r} has {stop - start} bytes, and shape {shape} of {code} takes "
                f"{math.prod(shape) * dtype.itemsize}"
            )
        found[name] = dtype, tuple(shape), start
        spans.append((start, stop))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(f"its arrays leave a hole or overlap at byte {end}")
        end = stop
    if end != size:
        raise ValueError(f"its arrays take {end:,} bytes, and {size:,} follow the header")
    return found


def _sizes(value: Any) -> bool:
    """Tell whether a value from JSON is a short list of counts."""
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(n) is int and 0 <= n < 2**63 for n in value)
    )
