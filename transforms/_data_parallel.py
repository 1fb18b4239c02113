"""Lay a batch out over devices, with the bits of one device."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fnml.core import LayoutError, nearest
from fnml.transforms._layout import (
    GradFn,
    Laid,
    Sums,
    check_blocks,
    check_one_device,
    laid,
    pairwise,
    split_batch,
)

PyTree = Any
Reduce = Literal["exact", "fast"]


def data_parallel(
    grad_fn: GradFn, mesh: Mesh, axis: str = "data", *, reduce: Reduce = "exact"
) -> GradFn:
    """Compute a batch's gradients on the devices along a mesh axis, each on its part.

    Device ``d`` of ``D`` takes the examples ``[d * B / D, (d + 1) * B / D)``, as logical shard
    ``d`` (or, over an accumulated gradient of ``A`` micro-batches, the shards ``d * A .. d * A + A
    - 1``). Parameters are replicated along the axis, and so are the results. It works inside
    ``jax.jit`` and outside.

    With ``reduce="exact"`` partial sums are added pairwise in the fixed order of shards: an
    all-to-all hands each device one slice of every partial sum, it adds them in order, and an
    all-gather puts the slices together. That moves the bytes of a ring all-reduce. With
    ``reduce="fast"``, ``lax.psum`` adds in whatever order the backend likes.

    Law: ``data_parallel(g, D) == accumulate(g, D) == data_parallel(accumulate(g, a), d) ==
    accumulate(data_parallel(g, d), a)`` for ``a * d == D``, bit for bit with ``reduce="exact"``
    and ``a`` a power of two, metrics included.

    Args:
      grad_fn: a gradient function, or one that :func:`accumulate` laid out.
      mesh: the device mesh.
      axis: the mesh axis to divide the batch over.
      reduce: ``"exact"`` or ``"fast"``.

    Raises:
      LayoutError: the mesh has no such axis, ``reduce`` is unknown, ``grad_fn`` is laid out over
        devices already or over a number of shards that is no power of two, or the axis does not divide the batch (when called).

    >>> import jax, jax.numpy as jnp
    >>> from fnml.core import Mean, Metrics
    >>> def loss_fn(params, batch, key):
    ...     error = Mean.of((batch - params) ** 2)
    ...     return error.value, Metrics(error.weight)
    >>> grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> parallel = data_parallel(grad_fn, mesh)
    >>> float(parallel(jnp.float32(0), jnp.array([1.0, 3.0]), jax.random.key(0))[1])
    -4.0
    """
    if axis not in mesh.shape:
        raise LayoutError(
            f"the mesh has the axes {tuple(mesh.shape)}, not {axis!r}."
            f"{nearest(axis, map(str, mesh.shape))}"
        )
    check_reduce(reduce)
    devices, inner = mesh.shape[axis], laid(grad_fn)
    check_blocks(inner, "data_parallel")
    check_one_device(inner, "data_parallel")

    def sums(
        params: PyTree, batch: PyTree, key: jax.Array, first: jax.Array, options: dict[str, Any]
    ) -> Sums:
        split_batch(batch, devices)
        # Options may hold arrays (a model's state) or settings (train=True).
        arrays = {name: value for name, value in options.items() if is_data(value)}
        settings = {name: value for name, value in options.items() if name not in arrays}

        def local(
            params: PyTree, part: PyTree, key: jax.Array, first: jax.Array, arrays: dict[str, Any]
        ) -> Sums:
            start = first + lax.axis_index(axis).astype(jnp.int32) * inner.shards
            own = inner.sums(params, part, key, start, {**arrays, **settings})
            return across(own, axis, devices, reduce)

        # check_vma=False: under it the gradient of replicated parameters stays the device's own.
        run = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P(), P(axis), P(), P(), P()),
            out_specs=P(),
            check_vma=False,
        )
        return run(params, batch, key, first, arrays)

    return Laid(devices * inner.shards, sums, devices)


def check_reduce(reduce: str) -> None:
    """Refuse a way of reducing that there is not."""
    if reduce not in ("exact", "fast"):
        raise LayoutError(
            f"reduce is 'exact' or 'fast', got {reduce!r}.{nearest(reduce, ['exact', 'fast'])}"
        )


def is_data(value: Any) -> bool:
    """Tell arrays, which are passed on to devices, from settings such as ``train=True``."""
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(hasattr(leaf, "dtype") for leaf in leaves)


def across(sums: Sums, axis: str, devices: int, reduce: Reduce) -> Sums:
    """Add one :class:`Sums` per device along a mapped axis; every device gets the total.

    All leaves of a dtype travel as one buffer, so there is one collective of each kind per dtype.
    """
    if reduce == "fast":
        return jax.tree.map(lambda x: lax.psum(x, axis), sums)
    leaves, tree = jax.tree.flatten(sums)
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        groups.setdefault(leaf.dtype, []).append(i)
    for indices in groups.values():
        flat = jnp.concatenate([leaves[i].reshape(-1) for i in indices])
        total = _ordered_total(flat, axis, devices)
        at = 0
        for i in indices:
            size = leaves[i].size
            leaves[i] = total[at : at + size].reshape(leaves[i].shape)
            at += size
    return jax.tree.unflatten(tree, leaves)


def _ordered_total(flat: jax.Array, axis: str, devices: int) -> jax.Array:
    """Add vectors ``[N]`` of all devices pairwise in the order of their index."""
    padded = jnp.pad(flat, (0, -flat.size % devices)).reshape(devices, -1)
    # Row j of what arrives is device j's part of the slice that this device adds up.
    slices = lax.all_to_all(padded, axis, split_axis=0, concat_axis=0)
    total = pairwise([slices[j] for j in range(devices)])
    return lax.all_gather(total, axis, tiled=True)[: flat.size]
