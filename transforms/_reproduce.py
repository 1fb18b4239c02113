"""Write a function's arguments to files, and read them back: arrays as npz, the rest as JSON."""

import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnml.core import ConfigError, ShapeError, leaf_names, write_atomic, write_json

PyTree = Any


def save_arguments(directory: Path | str, args: tuple[Any, ...], **report: Any) -> Path:
    """Write ``arguments.npz`` and ``report.json`` into a directory, made if missing.

    Typed keys and dtypes that NumPy does not have are kept by their bits. Nothing is pickled.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = save_arguments(directory, ({"w": jnp.ones(2)}, jax.random.key(7)))
    ...     params, key = load_arguments(path)
    >>> params["w"].tolist(), jax.random.key_data(key).tolist()
    ([1.0, 1.0], [0, 7])
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    arrays, kinds = {}, []
    for i, leaf in enumerate(jax.tree.leaves(args)):
        array, kind = _plain(leaf)
        arrays[str(i)] = array
        kinds.append(kind)
    data = io.BytesIO()
    np.savez(data, allow_pickle=False, **arrays)
    write_atomic(directory / "arguments.npz", data.getvalue())
    counter = iter(range(len(kinds)))
    described = {
        **report,
        "arguments": _structure(args, counter),
        "paths": leaf_names(args),
        "kinds": kinds,
    }
    write_json(directory / "report.json", described)
    return directory


def load_arguments(directory: Path | str, like: tuple[Any, ...] | None = None) -> tuple[Any, ...]:
    """Read what :func:`save_arguments` wrote.

    Args:
      directory: the directory.
      like: arguments of the same structure, needed if they hold other containers than dicts,
        lists and tuples.

    Raises:
      ConfigError: the arguments hold other containers, and ``like`` is not given.
      ShapeError: ``like`` has another number of leaves.
    """
    directory = Path(directory)
    report = json.loads((directory / "report.json").read_text())
    with np.load(directory / "arguments.npz", allow_pickle=False) as file:
        leaves = [_restored(file[str(i)], kind) for i, kind in enumerate(report["kinds"])]
    if like is not None:
        tree: Any = jax.tree.structure(like)
        if tree.num_leaves != len(leaves):
            raise ShapeError(
                f"{directory} holds {len(leaves)} arrays, `like` has {tree.num_leaves} leaves"
            )
        return jax.tree.unflatten(tree, leaves)
    return _rebuilt(report["arguments"], leaves, directory)


def _plain(leaf: Any) -> tuple[np.ndarray, str]:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(leaf)), f"key {jax.random.key_impl(leaf)}"
    array = np.asarray(leaf)
    if array.dtype.kind == "V":
        return array.view(f"u{array.dtype.itemsize}"), array.dtype.name
    return array, array.dtype.name


def _restored(array: np.ndarray, kind: str) -> jax.Array:
    if kind.startswith("key "):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=kind.removeprefix("key "))
    return jnp.asarray(array.view(jnp.dtype(kind)))


def _structure(tree: Any, counter: Any) -> Any:
    if type(tree) is dict and all(isinstance(key, str) for key in tree):
        return {"dict": {key: _structure(tree[key], counter) for key in sorted(tree)}}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [_structure(x, counter) for x in tree]}
    if tree is None:
        return None
    leaves = jax.tree.leaves(tree)
    if len(leaves) == 1 and leaves[0] is tree:
        return next(counter)
    for _ in leaves:
        next(counter)
    return {"other": type(tree).__name__}


def _rebuilt(what: Any, leaves: list[Any], directory: Path) -> Any:
    if what is None:
        return None
    if isinstance(what, int):
        return leaves[what]
    [(kind, inside)] = what.items()
    if kind == "dict":
        return {key: _rebuilt(x, leaves, directory) for key, x in inside.items()}
    if kind == "other":
        raise ConfigError(
            f"the arguments in {directory} hold a {inside}, which is no dict, list or tuple: pass "
            "like= with arguments of the same structure"
        )
    built = [_rebuilt(x, leaves, directory) for x in inside]
    return built if kind == "list" else tuple(built)
