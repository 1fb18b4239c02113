"""Name, describe and compare the leaves of a tree, and copy them to the host."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fnml.core import ShapeError, leaf_names, nearest

PyTree = Any


class Leaf(NamedTuple):
    """What is known of an array without its bytes.

    Attributes:
      shape: its shape; of a typed key array the shape without the key's words.
      dtype: the dtype's name, such as ``bfloat16`` or ``key<fry>``.
      impl: the generator of a typed key, such as ``threefry2x32``; ``None`` for other arrays.
    """

    shape: tuple[int, ...]
    dtype: str
    impl: str | None = None


def is_key(leaf: Any) -> bool:
    """Tell whether ``leaf`` (an array or its description) holds typed random keys."""
    return bool(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of ``tree`` by path.

    Raises:
      ShapeError: a leaf has no shape and dtype, or two leaves have the same path; all are listed.
    """
    names, leaves = leaf_names(tree), jax.tree.leaves(tree)
    faults = [
        f"  {name}: {type(leaf).__name__} is no array; wrap it with jnp.asarray(value, dtype)"
        for name, leaf in zip(names, leaves, strict=True)
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype"))
    ]
    faults += [
        f"  {name}: {times} leaves share this path; rename all but one"
        for name, times in Counter(names).items()
        if times > 1
    ]
    if faults:
        raise ShapeError("the tree cannot be stored by path:\n" + "\n".join(faults))
    return dict(zip(names, leaves, strict=True))


def describe(leaves: Mapping[str, Any]) -> dict[str, Leaf]:
    """Describe each array (or abstract array) by name; ``impl`` is known of real keys only."""

    def one(leaf: Any) -> Leaf:
        real_key = isinstance(leaf, jax.Array) and is_key(leaf)
        impl = str(jax.random.key_impl(leaf)) if real_key else None
        return Leaf(tuple(leaf.shape), str(leaf.dtype), impl)

    return {name: one(leaf) for name, leaf in leaves.items()}


def mismatches(stored: Mapping[str, Leaf], expected: Mapping[str, Leaf]) -> list[str]:
    """List every difference between two descriptions, one line each, by path."""
    lines = []
    for name in sorted(stored.keys() | expected.keys()):
        if name not in stored:
            near = nearest(name, stored.keys() - expected.keys())
            lines.append(f"  {name}: expected, but not in the file.{near}")
        elif name not in expected:
            lines.append(f"  {name}: in the file, but not expected")
        else:
            got, want = stored[name], expected[name]
            if got.shape != want.shape:
                lines.append(f"  {name}: has shape {got.shape} in the file, expected {want.shape}")
            if got.dtype != want.dtype:
                lines.append(
                    f"  {name}: has dtype {got.dtype} in the file, expected {want.dtype} "
                    "(nothing is cast silently)"
                )
    return lines


def too_wide(leaves: Mapping[str, Any]) -> list[str]:
    """List targets that JAX could hold only after narrowing them."""
    return [
        f"  {name}: dtype {leaf.dtype} needs jax_enable_x64, or a NumPy array as its target"
        for name, leaf in leaves.items()
        if not isinstance(leaf, np.ndarray | np.generic)
        and not is_key(leaf)
        and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype
    ]


def to_host(leaves: Mapping[str, Any], buffers: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Copy arrays into host memory that no device buffer shares; of typed keys the key data.

    Args:
      leaves: arrays by name, on any devices of this process.
      buffers: what an earlier call returned: its memory is overwritten where shape and dtype fit,
        which spares the page faults of a fresh allocation.

    Raises:
      ShapeError: arrays are spread over several processes.
    """
    faults = [
        f"  {name}: {leaf.sharding}"
        for name, leaf in leaves.items()
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    ]
    if faults:
        raise ShapeError(
            "these arrays are spread over several processes, but a checkpoint is saved by one "
            "process from arrays that it holds whole:\n" + "\n".join(faults)
        )
    host: dict[str, np.ndarray] = {}
    pieces: list[tuple[str, Any, Any]] = []
    for name, leaf in leaves.items():
        data = jax.random.key_data(leaf) if is_key(leaf) else leaf
        old = buffers.get(name)
        fits = old is not None and old.shape == data.shape and old.dtype == data.dtype
        host[name] = old if fits else np.empty(data.shape, data.dtype)  # type: ignore[assignment]
        if isinstance(data, jax.Array):
            shards = [shard for shard in data.addressable_shards if shard.replica_id == 0]
            pieces += [(name, shard.index, shard.data) for shard in shards]
        else:
            pieces.append((name, ..., data))
    for _, _, data in pieces:
        if isinstance(data, jax.Array):
            data.copy_to_host_async()
    for name, index, data in pieces:
        # np.asarray alone would alias the buffer of a CPU device, which is soon donated.
        host[name][index] = np.asarray(data)
    return host


def place(value: np.ndarray, leaf: Leaf, target: Any) -> Any:
    """Turn host data into the kind of array that ``target`` is, where ``target`` is.

    Args:
      value: the array's data, or the key data of typed keys.
      leaf: its description.
      target: a NumPy array gives NumPy; an array or ``ShapeDtypeStruct`` gives a JAX array, on
        its sharding if it is committed to one.
    """
    if isinstance(target, np.ndarray | np.generic):
        return value
    array = jax.numpy.array(value)
    if leaf.impl is not None:
        array = jax.random.wrap_key_data(array, impl=leaf.impl)
    sharding = sharding_of(target)
    return array if sharding is None else jax.device_put(array, sharding)


def sharding_of(target: Any) -> jax.sharding.Sharding | None:
    """Return where ``target`` has to live, or ``None`` if it may live anywhere."""
    if isinstance(target, jax.Array) and not getattr(target, "committed", True):
        return None
    return getattr(target, "sharding", None)


def size_in_bytes(leaves: Mapping[str, Any]) -> int:
    """Sum the bytes of arrays; typed keys count with their key data."""
    data = (jax.random.key_data(leaf) if is_key(leaf) else leaf for leaf in leaves.values())
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in data)
