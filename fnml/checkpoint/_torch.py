"""Parameters in PyTorch's file format, without PyTorch."""

import math
import os
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fnml.checkpoint import _state_dict
from fnml.checkpoint._state_dict import Storage, Tensor
from fnml.checkpoint._weights import fit, host_arrays, reading, written
from fnml.checkpoint._zip import opened, read_array
from fnml.core import ShapeError

PyTree = Any

_PICKLE = "data.pkl"
# Some twenty thousand tensors; what needs more instructions is no list of weights.
_PICKLE_LIMIT = 8 * 2**20
_ALIGNMENT = 64
_LOCAL_HEADER, _ZIP64_EXTRA, _EXTRA_HEADER = 30, 20, 4
_WIDE = 2**31 - 2**27  # from here on zipfile wants to be told that a record is large
_ROOT = "weights"


def save_torch(path: str | os.PathLike[str], params: PyTree) -> None:
    """Write parameters as a state dict that ``torch.load(path, weights_only=True)`` reads.

    The paths become the names, with dots for slashes; atomically, and without PyTorch.

    Args:
      path: the file; an old one is replaced.
      params: a tree of arrays.

    Law: ``load_torch(path, params)`` has the bits of ``params``.

    Raises:
      ShapeError: leaves that have no legacy storage in PyTorch (typed keys, uint16 to uint64, 4-
        and 8-bit floats), all listed; or two paths that differ in a dot only.
      CheckpointError: the file cannot be written; an old one is kept.

    >>> import tempfile, pathlib, jax.numpy as jnp
    >>> path = pathlib.Path(tempfile.mkdtemp(), "model.pt")
    >>> save_torch(path, {"layers": [jnp.arange(3)]})
    >>> load_torch(path)["layers.0"].tolist()
    [0, 1, 2]
    """
    leaves = host_arrays(params, set(_state_dict.STORAGES.values()), "a torch state dict")
    arrays = _respelt(leaves, "/", ".")
    index = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
    with (
        written(path) as temporary,
        temporary.open("wb") as file,
        zipfile.ZipFile(file, "w") as archive,
    ):

        def add(name: str, data: bytes | memoryview) -> None:
            member = _aligned(f"{_ROOT}/{name}", len(data), file.tell())
            with archive.open(member, "w", force_zip64=len(data) >= _WIDE) as record:
                record.write(data)

        add(_PICKLE, _state_dict.render(index))
        add("byteorder", b"little")
        for number, array in enumerate(arrays.values()):
            add(f"data/{number}", array.reshape(-1).view(np.uint8).data)
        add("version", b"3\n")


def _aligned(name: str, size: int, offset: int) -> zipfile.ZipInfo:
    """Describe a record whose bytes are aligned, since PyTorch maps only such into memory."""
    member = zipfile.ZipInfo(name)
    start = offset + _LOCAL_HEADER + len(name) + _ZIP64_EXTRA * (size >= _WIDE)
    padding = -(start + _EXTRA_HEADER) % _ALIGNMENT
    member.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    return member


def load_torch(path: str | os.PathLike[str], target: PyTree | None = None) -> Any:
    """Read the weights of a ``.pt`` or ``.pth`` file, which may come from anyone.

    The pickle in it is interpreted by some eighty lines that know what a state dict is made of:
    dicts, lists, numbers, texts and tensors. Names of functions are compared with a short list and
    never imported, so nothing in the file is called; anything else is refused by name.
    ``torch.load(weights_only=True)`` restricts a pickle in the same way, but needs two gigabytes of
    package, and that restriction has been broken before (CVE-2025-32434). Python's own unpickler
    with another ``find_class`` would still let a file set attributes of what it finds and ask for
    memory at will. Sizes are checked before there is memory for them, checksums verified.

    Args:
      path: a file of ``torch.save`` since 1.6; the older format is refused.
      target: a tree of arrays or :class:`jax.ShapeDtypeStruct` with the file's names (a slash for
        each dot), shapes and dtypes; :func:`fnml.checkpoint.import_weights` takes other names.

    Returns:
      With a target, a tree like it of JAX arrays; without, read-only NumPy arrays by name. The
      names of nested dicts are joined by slashes; what is no tensor is left out.

    Raises:
      CheckpointError: the file is missing or damaged, holds something other than weights, or
        differs from ``target`` (all listed).
    """
    path = Path(path)
    with reading(path):
        _refuse_old(path)
        arrays = _read(path)
    return fit(path, arrays if target is None else _respelt(arrays, ".", "/"), target)


def _respelt(arrays: dict[str, np.ndarray], old: str, new: str) -> dict[str, np.ndarray]:
    """Name arrays with another separator.

    Raises:
      ShapeError: two of them would have one name.
    """
    found: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if (spelt := name.replace(old, new)) in found:
            raise ShapeError(f"{name!r} and another name would both be {spelt!r}: rename one")
        found[spelt] = array
    return found


def _refuse_old(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(2)
    if start[:1] == b"\x80":
        raise ValueError(
            "it is a bare pickle, as torch.save wrote before version 1.6: load it where you trust "
            "it and save it again"
        )


def _read(path: Path) -> dict[str, np.ndarray]:
    with opened(path) as (archive, members):
        roots = [n.removesuffix(_PICKLE) for n in members if n.endswith(f"/{_PICKLE}")]
        if len(roots) != 1:
            raise ValueError(f"it holds {len(roots)} files {_PICKLE}, expected one: no state dict")
        (root,) = roots

        def record(name: str, size: int) -> bytes:
            if members[root + name].file_size > size:
                raise ValueError(f"its {name} is longer than {size:,} bytes")
            return archive.read(root + name)

        if root + "byteorder" in members and record("byteorder", 16).strip() != b"little":
            raise ValueError("its numbers are big-endian: save it again on a little-endian machine")
        tensors: dict[str, Tensor] = {}
        _flatten(_state_dict.parse(record(_PICKLE, _PICKLE_LIMIT)), "", tensors, set())
        storages: dict[str, np.ndarray] = {}
        for tensor in tensors.values():
            storage = tensor.storage
            if storage.key not in storages:
                info = members.get(f"{root}data/{storage.key}")
                if info is None:
                    raise ValueError(f"its storage {storage.key!r} is missing")
                with archive.open(info) as file:
                    storages[storage.key] = read_array(file, np.dtype(np.uint8), info.file_size)
        return {
            name: _view(name, tensor, storages[tensor.storage.key])
            for name, tensor in tensors.items()
        }


def _flatten(value: Any, path: str, tensors: dict[str, Tensor], seen: set[int]) -> None:
    """Collect the tensors of nested dicts and lists by path."""
    if isinstance(value, Tensor):
        if path in tensors:
            raise ValueError(f"two of its tensors are called {path!r}")
        tensors[path] = value
    elif type(value) in (dict, list, tuple):
        # One container in many places would make a short file a tree without end.
        if value and id(value) in seen:
            raise ValueError(
                f"it holds one {type(value).__name__} in two places, again at {path!r}"
            )
        seen.add(id(value))
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            _flatten(item, f"{path}/{key}" if path else str(key), tensors, seen)


def _view(name: str, tensor: Tensor, data: np.ndarray) -> np.ndarray:
    dtype = jnp.dtype(tensor.dtype)
    storage: Storage = tensor.storage
    width = 1 if storage.dtype is None else jnp.dtype(storage.dtype).itemsize
    if data.size != storage.size * width or data.size % dtype.itemsize:
        raise ValueError(
            f"storage {storage.key!r} of {name!r} has {data.size} bytes, which are not "
            f"{storage.size} of {storage.dtype or 'uint8'}"
        )
    flat = data.view(dtype)
    count = math.prod(tensor.shape)
    if not count:
        return np.empty(tensor.shape, dtype)
    spans = zip(tensor.shape, tensor.strides, strict=True)
    last = tensor.offset + sum((size - 1) * stride for size, stride in spans)
    if last >= flat.size:
        raise ValueError(f"{name!r} reaches element {last} of a storage of {flat.size}")
    if count > flat.size:
        raise ValueError(f"{name!r} is expanded: {count} elements from {flat.size}; save a clone")
    strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
    return np.lib.stride_tricks.as_strided(
        flat[tensor.offset :], tensor.shape, strides, writeable=False
    )
