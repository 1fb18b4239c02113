"""What the weight file formats share: arrays out of a tree, and into one."""

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fnml.checkpoint._tree import describe, mismatches, named_leaves, place, to_host, too_wide
from fnml.core import CheckpointError, ShapeError, atomic_path

PyTree = Any


def host_arrays(params: PyTree, dtypes: Collection[str], form: str) -> dict[str, np.ndarray]:
    """Return the leaves of ``params`` by path: contiguous, in the machine's byte order.

    Raises:
      ShapeError: leaves whose dtype is not one of ``dtypes``, which ``form`` holds; all listed.
    """
    leaves = named_leaves(params)
    native = {
        name: leaf.astype(leaf.dtype.newbyteorder("=")) if _is_swapped(leaf) else leaf
        for name, leaf in leaves.items()
    }
    faults = [f"  {n}: {leaf.dtype}" for n, leaf in native.items() if str(leaf.dtype) not in dtypes]
    if faults:
        raise ShapeError(f"{form} cannot hold these dtypes:\n" + "\n".join(faults))
    return to_host(native, {})


def _is_swapped(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray | np.generic) and not leaf.dtype.isnative


def fit(path: Path, arrays: Mapping[str, np.ndarray], target: PyTree | None) -> Any:
    """Return ``arrays``, or with a target a tree like it that holds them.

    Raises:
      CheckpointError: the arrays differ from ``target`` in path, shape or dtype; all listed.
    """
    if target is None:
        return dict(arrays)
    leaves = named_leaves(target)
    stored = describe(arrays)
    faults = mismatches(stored, describe(leaves)) or too_wide(leaves)
    if faults:
        raise CheckpointError(f"{path} does not fit the target:\n" + "\n".join(faults))
    placed = [place(arrays[name], stored[name], leaf) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(target), placed)


@contextlib.contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a name to write to, as :func:`fnml.core.atomic_path` does.

    Raises:
      CheckpointError: the file cannot be written; an old one is kept.
    """
    try:
        with atomic_path(Path(path)) as temporary:
            yield temporary
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong with a file that nobody vouches for into a named error.

    Raises:
      CheckpointError: the file cannot be read.
    """
    try:
        yield
    # A damaged file can fail anywhere in a parser, with almost any type.
    except Exception as error:
        ours = isinstance(error, ValueError | OSError) and str(error)
        what = str(error) if ours else f"it is damaged ({type(error).__name__}: {error})"
        raise CheckpointError(f"{path} cannot be read: {what}") from error
