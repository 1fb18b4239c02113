"""Arrays on disk, in Orbax's format."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fnml.checkpoint._tree import Leaf, is_key, place, sharding_of

# OCDBT with Zarr 3 and no compression: about ten files beside the data, whatever the number of
# arrays (without OCDBT two per array, each to be hashed and made durable), and as quick to write as
# plain files; float parameters hardly compress.
_LAYOUT = {"use_ocdbt": True, "use_zarr3": True, "use_compression": False}

# Several data files can be hashed at once.
_DATA_FILE = 64 * 2**20
# Beyond it Orbax's own choice applies.
_LARGE_ARRAY = 2 * 10**9


def _checkpointer(**options: Any) -> tuple[Any, Any]:
    import orbax.checkpoint as ocp

    # Orbax would have all processes meet; here each reads by itself, and one writes.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"fnml-{me}"
    )
    handler = ocp.PyTreeCheckpointHandler(**_LAYOUT, **options, multiprocessing_options=alone)
    return ocp, ocp.Checkpointer(handler, multiprocessing_options=alone)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write host arrays as one flat Orbax tree; it returns when they are written.

    They are read where they are: nobody may change them before it returns.

    Arrays without elements are left out: Orbax refuses them, and the manifest knows their shape.
    """
    kept = {name: array for name, array in arrays.items() if array.size}
    if not kept:
        return
    ocp, checkpointer = _checkpointer(type_handler_registry=_writers())
    save = ocp.args.PyTreeSave(kept, ocdbt_target_data_file_size=_data_file_size(kept))
    with checkpointer:
        checkpointer.save(path.absolute(), args=save)


def _writers() -> Any:
    """Make Orbax's handlers of arrays, without the copy that it takes of every NumPy array.

    The copy guards against changes during the write; it cost 0.45 s of 0.7 s for 200 MB.
    """
    from orbax.checkpoint import type_handlers

    try:
        numpy_handler = type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    except TypeError:  # the first releases of Orbax 0.12 always copy
        numpy_handler = type_handlers.NumpyHandler()
    return type_handlers.create_type_handler_registry(
        (np.ndarray, numpy_handler),
        # Not used, but Orbax warns where it is missing.
        (jax.Array, type_handlers.ArrayHandler()),
    )


def _data_file_size(arrays: Mapping[str, np.ndarray]) -> int | None:
    """Choose the size that a data file may have; no array is larger.

    Orbax cuts a larger array into chunks, and one of 200 MB then took 6 times as long to write and
    16 times as long to read.
    """
    largest = max(array.nbytes for array in arrays.values())
    return max(_DATA_FILE, largest) if largest <= _LARGE_ARRAY else None


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
