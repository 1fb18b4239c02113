"""Parameters in one file that other programs read."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fnml.checkpoint._tree import describe, mismatches, named_leaves, place, to_host, too_wide
from fnml.core import CheckpointError, ShapeError, fsync_directory

PyTree = Any

# What the package's NumPy side both writes and reads.
_FLOATS = {"float64", "float32", "float16", "bfloat16", "complex64"}
_INTEGERS = {"int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"}
_DTYPES = _FLOATS | _INTEGERS


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
    >>> load_safetensors(path)
    {'w': array([0, 1, 2], dtype=int32)}
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    leaves = named_leaves(params)
    faults = [
        f"  {name}: {leaf.dtype}" for name, leaf in leaves.items() if str(leaf.dtype) not in _DTYPES
    ]
    if faults:
        raise ShapeError("safetensors cannot hold these dtypes:\n" + "\n".join(faults))
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(to_host(leaves, {}), temporary, metadata=dict(metadata or {}))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


def load_safetensors(path: str | os.PathLike[str], target: PyTree | None = None) -> Any:
    """Read a safetensors file.

    Args:
      path: the file.
      target: a tree of arrays or :class:`jax.ShapeDtypeStruct` with the file's paths, shapes and
        dtypes; leaves with a sharding are put onto it.

    Returns:
      With a target, a tree like it of JAX arrays; without, NumPy arrays by path.

    Raises:
      CheckpointError: the file is missing or damaged, or differs from ``target`` (all listed).
    """
    arrays = _read(Path(path))
    if target is None:
        return arrays
    leaves = named_leaves(target)
    stored = describe(arrays)
    faults = mismatches(stored, describe(leaves)) or too_wide(leaves)
    if faults:
        raise CheckpointError(f"{path} does not fit the target:\n" + "\n".join(faults))
    placed = [place(arrays[name], stored[name], leaf) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(target), placed)


def _read(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
