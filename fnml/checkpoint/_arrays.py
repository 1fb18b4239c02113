"""Arrays on disk, in Orbax's format."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fnml.checkpoint._tree import Leaf, is_key, place, sharding_of

# OCDBT with Zarr 3 and no compression: about ten files whatever the number of arrays (without
# OCDBT two per array, each to be hashed and made durable), and as quick to write as plain files;
# float parameters hardly compress.
_LAYOUT = {"use_ocdbt": True, "use_zarr3": True, "use_compression": False}


def _checkpointer() -> tuple[Any, Any]:
    import orbax.checkpoint as ocp

    return ocp, ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**_LAYOUT))


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write host arrays as one flat Orbax tree; it returns when they are written.

    Arrays without elements are left out: Orbax refuses them, and the manifest knows their shape.
    """
    kept = {name: array for name, array in arrays.items() if array.size}
    if not kept:
        return
    ocp, checkpointer = _checkpointer()
    with checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(kept))


def read_arrays(path: Path, tree: Mapping[str, Leaf], targets: Mapping[str, Any]) -> dict[str, Any]:
    """Read the arrays described by ``tree`` into what ``targets`` of the same names describe."""
    names = [name for name, leaf in tree.items() if 0 not in leaf.shape]
    read = _read(path, {name: targets[name] for name in names}) if names else {}
    # Orbax leaves the placeholder where the file has no such array.
    missing = [name for name, value in read.items() if not hasattr(value, "shape")]
    if missing:
        raise ValueError(f"the file does not hold {', '.join(missing)}, which its manifest lists")

    def finish(name: str, leaf: Leaf) -> Any:
        target = targets[name]
        if name not in read:
            return place(_empty(leaf, target), leaf, target)
        value = read[name]
        return place(value, leaf, target) if isinstance(value, np.ndarray) else value

    return {name: finish(name, leaf) for name, leaf in tree.items()}


def _empty(leaf: Leaf, target: Any) -> np.ndarray:
    """Make the data of an array without elements."""
    if leaf.impl is None:
        return np.empty(leaf.shape, target.dtype)
    words = jax.random.key_data(jax.random.key(0, impl=leaf.impl))
    return np.empty((*leaf.shape, *words.shape), words.dtype)


def _read(path: Path, targets: Mapping[str, Any]) -> dict[str, Any]:
    ocp, checkpointer = _checkpointer()

    def how(target: Any) -> Any:
        sharding = None if is_key(target) else sharding_of(target)
        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=tuple(target.shape))

    with checkpointer:
        return checkpointer.restore(
            path.absolute(),
            args=ocp.args.PyTreeRestore(
                item=dict.fromkeys(targets, 0),
                restore_args={name: how(target) for name, target in targets.items()},
                partial_restore=True,
            ),
        )
