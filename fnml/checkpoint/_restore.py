"""Read a saved step back, after verifying it."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from fnml.checkpoint._arrays import read_arrays
from fnml.checkpoint._manifest import Manifest, load_json
from fnml.checkpoint._steps import ARRAYS, META, committed
from fnml.checkpoint._tree import describe, mismatches, named_leaves, too_wide
from fnml.checkpoint._verify import Fault, verify_step
from fnml.core import CheckpointError

PyTree = Any

_logger = logging.getLogger("fnml.checkpoint")
_LISTED = 5


class Restored(NamedTuple):
    """A step as it was saved."""

    step: int
    state: PyTree
    meta: dict[str, Any]


def restore(
    directory: str | os.PathLike[str],
    target: PyTree,
    *,
    step: int | None = None,
    on_skip: Callable[[str], object] = _logger.warning,
) -> Restored:
    """Restore a saved step; every file is verified before anything is read.

    Args:
      directory: where a :class:`Checkpointer` saved.
      target: a tree like the saved state, of arrays or :class:`jax.ShapeDtypeStruct`. Where a leaf
        has a sharding, the array is restored onto it: any devices, not only those it was saved
        from. NumPy leaves give NumPy arrays.
      step: the step to restore; by default the newest that is whole.
      on_skip: called with one sentence for every newer step that is damaged.

    Law: the restored state has the bits of the saved one.

    Returns:
      The step, the state with the structure of ``target``, and the meta data.

    Raises:
      CheckpointError: no step is whole, the requested one is missing or damaged, or its tree,
        shapes or dtypes differ from ``target`` (all differences are listed).

    >>> import tempfile, jax.numpy as jnp
    >>> from fnml.checkpoint import Checkpointer
    >>> directory = tempfile.mkdtemp()
    >>> with Checkpointer(directory) as checkpointer:
    ...     checkpointer.save(7, {"w": jnp.arange(3)}, {"epoch": 1})
    >>> restore(directory, {"w": jnp.zeros(3, jnp.int32)})
    Restored(step=7, state={'w': Array([0, 1, 2], dtype=int32)}, meta={'epoch': 1})
    """
    leaves = named_leaves(target)
    chosen, path, manifest = _choose(Path(directory), step, on_skip, meta_only=False)
    faults = mismatches(manifest.tree, describe(leaves)) or too_wide(leaves)
    if faults:
        raise CheckpointError(
            f"step {chosen} in {directory} does not fit the target:\n" + "\n".join(faults)
        )
    try:
        arrays = read_arrays(path / ARRAYS, manifest.tree, leaves)
    except Exception as error:
        raise CheckpointError(
            f"step {chosen} in {directory} is whole, but cannot be restored onto the target: "
            f"{type(error).__name__}: {error}"
        ) from error
    wrong = mismatches(describe(arrays), describe(leaves))
    if wrong:
        raise CheckpointError(
            f"step {chosen} in {directory} holds other arrays than its manifest says:\n"
            + "\n".join(wrong)
        )
    state = jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in leaves])
    return Restored(chosen, state, _read_meta(path, chosen))


def restore_meta(directory: str | os.PathLike[str], step: int | None = None) -> dict[str, Any]:
    """Read only the meta data of a saved step, verified; of the arrays only the sizes are checked.

    Args:
      directory: where a :class:`Checkpointer` saved.
      step: the step to read; by default the newest that passes.

    Raises:
      CheckpointError: there is no such step, or it is damaged.

    >>> import tempfile, jax.numpy as jnp
    >>> from fnml.checkpoint import Checkpointer
    >>> directory = tempfile.mkdtemp()
    >>> with Checkpointer(directory) as checkpointer:
    ...     checkpointer.save(7, {"w": jnp.arange(3)}, {"epoch": 1})
    >>> restore_meta(directory)
    {'epoch': 1}
    """
    chosen, path, _ = _choose(Path(directory), step, _logger.warning, meta_only=True)
    return _read_meta(path, chosen)


def _choose(
    directory: Path, step: int | None, on_skip: Callable[[str], object], *, meta_only: bool
) -> tuple[int, Path, Manifest]:
    """Return the requested step, or else the newest, that verifies."""
    steps = committed(directory)
    if step is not None and step not in steps:
        raise CheckpointError(f"{directory} has no step {step}; it has {_listing(steps)}")
    candidates = sorted(steps, reverse=True) if step is None else [step]
    damage = []
    for candidate in candidates:
        path = steps[candidate]
        manifest, faults = verify_step(path, candidate, {META} if meta_only else None)
        if manifest is not None and not faults:
            return candidate, path, manifest
        damage.append(_sentence(candidate, faults))
        if step is None:
            on_skip(f"{directory}: {damage[-1]}; trying an older one")
    if step is not None:
        raise CheckpointError(f"{directory}: {damage[0]}; its other steps: {_listing(steps, step)}")
    if not damage:
        raise CheckpointError(f"{directory} holds no saved step")
    raise CheckpointError(f"{directory} holds no undamaged step:\n" + "\n".join(damage))


def _sentence(step: int, faults: list[Fault]) -> str:
    shown = "; ".join(f"{fault.file} {fault.problem}" for fault in faults[:_LISTED])
    more = f"; and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
    return f"step {step} is damaged: {shown}{more}"


def _listing(steps: dict[int, Path], but: int | None = None) -> str:
    return ", ".join(str(step) for step in steps if step != but) or "none"


def _read_meta(path: Path, step: int) -> dict[str, Any]:
    try:
        meta = load_json((path / META).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{Fault(step, META, str(error))}") from error
    if not isinstance(meta, dict):
        raise CheckpointError(f"{Fault(step, META, 'is no JSON object')}")
    return meta
