"""The same layout through ``jax.pmap``."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnml.core import LayoutError
from fnml.transforms._data_parallel import Reduce, across, check_reduce, is_data
from fnml.transforms._layout import (
    GradFn,
    Laid,
    Sums,
    check_blocks,
    check_one_device,
    laid,
    split_batch,
)

PyTree = Any


def pmap(
    grad_fn: GradFn,
    devices: Sequence[jax.Device] | None = None,
    *,
    axis: str = "devices",
    reduce: Reduce = "exact",
) -> GradFn:
    """Compute a batch's gradients on several devices with ``jax.pmap``.

    For those who work with ``pmap``: the batch ``[B, ...]`` is divided over the devices and the
    result has one copy, as if one device had done it all. :func:`data_parallel` does the same
    inside ``jit`` and over one axis of a larger mesh.

    Law: ``pmap(g, devices) == data_parallel(g, mesh)``, bit for bit with ``reduce="exact"``.

    Args:
      grad_fn: a gradient function, or one that :func:`accumulate` laid out.
      devices: the devices; by default all local ones.
      axis: the name of the mapped axis, visible inside ``grad_fn``.
      reduce: see :func:`data_parallel`.

    Raises:
      LayoutError: as :func:`data_parallel`; also if there is no device.

    >>> import jax, jax.numpy as jnp
    >>> from fnml.core import Mean, Metrics
    >>> def loss_fn(params, batch, key):
    ...     error = Mean.of((batch - params) ** 2)
    ...     return error.value, Metrics(error.weight)
    >>> mapped = pmap(jax.value_and_grad(loss_fn, has_aux=True), jax.devices()[:1])
    >>> float(mapped(jnp.float32(0), jnp.array([1.0, 3.0]), jax.random.key(0))[1])
    -4.0
    """
    chosen = list(jax.local_devices() if devices is None else devices)
    if not chosen:
        raise LayoutError("pmap needs at least one device, got an empty list")
    check_reduce(reduce)
    count, inner = len(chosen), laid(grad_fn)
    check_blocks(inner, "pmap")
    check_one_device(inner, "pmap")

    def local(
        settings: tuple[tuple[str, Any], ...],
        shared: tuple[PyTree, jax.Array, jax.Array, dict[str, Any]],
        part: PyTree,
    ) -> Sums:
        params, key, first, arrays = shared
        start = first + lax.axis_index(axis).astype(jnp.int32) * inner.shards
        own = inner.sums(params, part, key, start, {**arrays, **dict(settings)})
        return across(own, axis, count, reduce)

    # What is shared is one argument, so that there are always more leaves than arguments: where the
    # two numbers happen to agree, jax 0.10.2 takes `in_axes` for a list of leaves, not arguments.
    mapped = jax.pmap(
        local,
        axis,
        in_axes=(None, None, 0),
        out_axes=None,
        static_broadcasted_argnums=0,
        devices=chosen,
    )

    def sums(
        params: PyTree, batch: PyTree, key: jax.Array, first: jax.Array, options: dict[str, Any]
    ) -> Sums:
        arrays = {name: value for name, value in options.items() if is_data(value)}
        settings = tuple(sorted((k, v) for k, v in options.items() if k not in arrays))
        return mapped(settings, (params, key, first, arrays), split_batch(batch, count))

    return Laid(count * inner.shards, sums, count)
