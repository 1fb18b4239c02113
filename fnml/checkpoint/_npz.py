"""Parameters in NumPy's own archive."""

import math
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from fnml.checkpoint._weights import fit, host_arrays, reading, written
from fnml.checkpoint._zip import opened, read_array

PyTree = Any

_FLOATS = {"float16", "float32", "float64", "complex64", "complex128"}
_INTEGERS = {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"}
_SUFFIX = ".npy"


def save_npz(path: str | os.PathLike[str], params: PyTree) -> None:
    """Write parameters under their paths as a ``.npz`` file, uncompressed and atomically.

    Args:
      path: the file, whatever it is called; an old one is replaced.
      params: a tree of arrays.

    Law: ``load_npz(path, params)`` has the bits of ``params``, and so has :func:`numpy.load`.

    Raises:
      ShapeError: leaves that NumPy has no dtype for (typed keys, bfloat16, 4- and 8-bit floats):
        a ``.npy`` header cannot say what they are. All are listed; safetensors holds bfloat16.
      CheckpointError: the file cannot be written; an old one is kept.

    >>> import tempfile, pathlib, jax.numpy as jnp
    >>> path = pathlib.Path(tempfile.mkdtemp(), "model.npz")
    >>> save_npz(path, {"layers": [jnp.arange(3)]})
    >>> load_npz(path)["layers/0"].tolist(), np.load(path)["layers/0"].tolist()
    ([0, 1, 2], [0, 1, 2])
    """
    arrays = host_arrays(params, _FLOATS | _INTEGERS, "npz")
    with written(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            # A fixed date: equal parameters give equal files.
            member = zipfile.ZipInfo(name + _SUFFIX)
            with archive.open(member, "w", force_zip64=True) as file:
                npy.write_array(file, array, allow_pickle=False)


def load_npz(path: str | os.PathLike[str], target: PyTree | None = None) -> Any:
    """Read a ``.npz`` file, also a compressed one; pickled objects are refused.

    Every array's size is known from the archive, and compared with its header, before there is
    memory for it; the archive's checksums are verified.

    Args:
      path: the file.
      target: a tree of arrays or :class:`jax.ShapeDtypeStruct` with the file's paths, shapes and
        dtypes; leaves with a sharding are put onto it.

    Returns:
      With a target, a tree like it of JAX arrays; without, read-only NumPy arrays by path.

    Raises:
      CheckpointError: the file is missing or damaged, holds something other than numbers, unpacks
        to over a hundred times its size, or differs from ``target`` (all listed).
    """
    path = Path(path)
    with reading(path), opened(path) as (archive, members):
        arrays = {
            name.removesuffix(_SUFFIX): _read(archive, name, info) for name, info in members.items()
        }
        if len(arrays) < len(members):
            raise ValueError("two of its arrays have one name")
    return fit(path, arrays, target)


def _read(archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as file:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name!r} has version {version} of the .npy format")
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        native = dtype.newbyteorder("=")
        if native.name not in _FLOATS | _INTEGERS:
            raise ValueError(f"{name!r} has dtype {dtype}, which is no number or not portable")
        count = math.prod(shape)
        if min(shape, default=0) < 0 or count * dtype.itemsize > info.file_size:
            raise ValueError(f"{name!r} has {info.file_size} bytes, too few for shape {shape}")
        flat = read_array(file, dtype, count)
    array = flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
    return array.astype(native, copy=False)
