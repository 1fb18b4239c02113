"""Write tokens to a file as they come."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fnml.core import DataError, atomic_path

_HEADER_BYTES = 128


def _header(dtype: np.dtype, count: int) -> bytes:
    """Return a ``.npy`` header (format 1.0) of fixed size, so that it can be rewritten."""
    text = repr({"descr": dtype.str, "fortran_order": False, "shape": (count,)})
    magic = np.lib.format.magic(1, 0)
    length = _HEADER_BYTES - len(magic) - 2
    return magic + length.to_bytes(2, "little") + text.ljust(length - 1).encode() + b"\n"


def _check(chunk: Any, number: int, written: int, dtype: np.dtype) -> np.ndarray:
    array = np.asarray(chunk)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise DataError(
            f"chunk {number} has shape {array.shape} and dtype {array.dtype}: "
            f"expected one-dimensional integers"
        )
    info = np.iinfo(dtype)
    if array.size and (array.min() < info.min or array.max() > info.max):
        at = int(np.flatnonzero((array < info.min) | (array > info.max))[0])
        raise DataError(
            f"chunk {number}: token {written + at} is {array[at]}, but {dtype} holds "
            f"{info.min} to {info.max}: choose a wider dtype"
        )
    return array.astype(dtype)


def write_tokens(
    path: str | os.PathLike[str], chunks: Iterable[np.ndarray], dtype: Any = np.uint16
) -> int:
    """Stream chunks of tokens ``[n]`` into a ``.npy`` file and return how many there were.

    Only one chunk is held in memory. The file appears whole, or not at all.

    Law: ``np.load(path) == np.concatenate(chunks)``, in ``dtype``.

    Raises:
      DataError: a chunk is not one-dimensional integers, a token does not fit into ``dtype``,
        or there is no token at all; an existing file is kept.
      OSError: the directory is missing or the disk is full; an existing file is kept.

    >>> import tempfile, numpy as np
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     count = write_tokens(f"{directory}/t.npy", ([i, i + 1] for i in (0, 7)))
    ...     print(count, np.load(f"{directory}/t.npy"))
    4 [0 1 7 8]
    """
    path, dtype = Path(path), np.dtype(dtype)
    if dtype.kind not in "iu":
        raise DataError(f"{path}: the dtype is {dtype}: tokens are integers, such as uint16")
    written = 0
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(_header(dtype, 0))
        for number, chunk in enumerate(chunks):
            array = _check(chunk, number, written, dtype)
            file.write(array.tobytes())
            written += array.size
        if not written:
            raise DataError(f"{path}: there is no token to write: every chunk was empty")
        file.seek(0)
        file.write(_header(dtype, written))
    return written
