"""Read a saved step back, after verifying it."""

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fnml.checkpoint._arrays import read_arrays
from fnml.checkpoint._manifest import Manifest, load_json
from fnml.checkpoint._rename import renamed
from fnml.checkpoint._steps import ARRAYS, META, committed
from fnml.checkpoint._tree import Leaf, describe, mismatches, named_leaves, too_wide
from fnml.checkpoint._verify import Fault, verify_step
from fnml.core import CheckpointError, mask

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
    target: PyTree = None,
    *,
    step: int | None = None,
    only: str | Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    on_skip: Callable[[str], object] = _logger.warning,
) -> Restored:
    """Restore a saved step; every file is verified before anything is read.

    Args:
      directory: where a :class:`Checkpointer` saved.
      target: a tree like the saved state, of arrays or :class:`jax.ShapeDtypeStruct`. Where a leaf
        has a sharding, the array is restored onto it: any devices, not only those it was saved
        from. NumPy leaves give NumPy arrays. ``None`` gives all arrays as NumPy, by path; typed
        keys as their key data.
      step: the step to restore; by default the newest that is whole.
      only: globs of the target's paths to restore, such as ``"params/**"``; the target's other
        leaves are kept, and what else the file holds is not read. Without it, target and file have
        to hold the same paths.
      rename: rules ``old glob -> new path`` for the file's paths, such as
        ``{"params/encoder/**": "params/body/**"}``; the first that matches a path decides, and a
        wildcard of the new path stands for what the same one of the old path matched.
      on_skip: called with one sentence for every newer step that is damaged.

    Law: the restored state has the bits of the saved one.

    Returns:
      The step, the state with the structure of ``target``, and the meta data.

    Raises:
      CheckpointError: no step is whole, the requested one is missing or damaged, or its tree,
        shapes or dtypes differ from ``target`` (all differences are listed).
      ConfigError: a glob of ``only`` or a rule of ``rename`` matches nothing, or two paths would
        get one name.

    >>> import tempfile, jax.numpy as jnp
    >>> from fnml.checkpoint import Checkpointer
    >>> directory = tempfile.mkdtemp()
    >>> with Checkpointer(directory) as checkpointer:
    ...     checkpointer.save(7, {"w": jnp.arange(3)}, {"epoch": 1})
    >>> restore(directory, {"w": jnp.zeros(3, jnp.int32)})
    Restored(step=7, state={'w': Array([0, 1, 2], dtype=int32)}, meta={'epoch': 1})
    >>> target = {"kernel": jnp.zeros(3, jnp.int32), "bias": jnp.ones(2)}
    >>> restore(directory, target, only="kernel", rename={"w": "kernel"}).state
    {'bias': Array([1., 1.], dtype=float32), 'kernel': Array([0, 1, 2], dtype=int32)}
    """
    chosen, path, manifest = _choose(Path(directory), step, on_skip, meta_only=False)
    where = f"step {chosen} in {directory}"
    new_names = renamed(manifest.tree, rename or {})
    tree = {new_names[old]: leaf for old, leaf in manifest.tree.items()}
    whole = target is None
    if whole:
        target = {name: _host_target(leaf, name, where) for name, leaf in tree.items()}
    leaves = named_leaves(target)
    wanted = leaves
    if only is not None:
        wanted = {name: leaves[name] for name, fits in mask(leaves, only).items() if fits}
        tree = {name: leaf for name, leaf in tree.items() if name in wanted}
    faults = [] if whole else _faults(tree, wanted, leaves)
    if faults:
        raise CheckpointError(f"{where} does not fit the target:\n" + "\n".join(faults))
    stored = {old: tree[new] for old, new in new_names.items() if new in tree}
    try:
        arrays = read_arrays(path / ARRAYS, stored, {old: wanted[new_names[old]] for old in stored})
    except Exception as error:
        raise CheckpointError(
            f"{where} is whole, but cannot be restored onto the target: "
            f"{type(error).__name__}: {error}"
        ) from error
    read = {new_names[old]: array for old, array in arrays.items()}
    plain = {name for name, leaf in tree.items() if not (whole and leaf.dtype.startswith("key<"))}
    wrong = mismatches(_some(describe(read), plain), _some(tree, plain))
    if wrong:
        raise CheckpointError(
            f"{where} holds other arrays than its manifest says:\n" + "\n".join(wrong)
        )
    if whole:
        return Restored(chosen, read, _read_meta(path, chosen))
    state = jax.tree.unflatten(
        jax.tree.structure(target), [read.get(name, leaf) for name, leaf in leaves.items()]
    )
    return Restored(chosen, state, _read_meta(path, chosen))


def _faults(
    tree: Mapping[str, Leaf], wanted: Mapping[str, Any], leaves: Mapping[str, Any]
) -> list[str]:
    """List every reason why what the file holds cannot become what is wanted."""
    kept = [
        f"  {name}: is kept from the target, which only describes it; give an array there"
        for name, leaf in leaves.items()
        if name not in wanted and isinstance(leaf, jax.ShapeDtypeStruct)
    ]
    return mismatches(tree, describe(wanted)) + kept or too_wide(wanted)


def _host_target(leaf: Leaf, name: str, where: str) -> np.ndarray:
    """Stand for an array that is read as NumPy, in its own dtype."""
    is_words = leaf.dtype.startswith("key<")
    try:
        # NumPy takes whole sentences for a dtype, and parses them as Python.
        if not (is_words or leaf.dtype.isidentifier()):
            raise TypeError("this is no name")
        dtype = jax.numpy.dtype(np.uint32 if is_words else leaf.dtype)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {name} has the dtype {leaf.dtype!r}: {error}") from error
    if dtype == np.dtype(object) or (not is_words and str(dtype) != leaf.dtype):
        raise CheckpointError(f"{where}: {name} has the dtype {leaf.dtype!r}, of no array")
    return np.empty(0, dtype)


def _some(tree: Mapping[str, Leaf], names: Collection[str]) -> dict[str, Leaf]:
    return {name: leaf for name, leaf in tree.items() if name in names}


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
