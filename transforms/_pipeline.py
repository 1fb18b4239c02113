"""Divide a stack of layers over devices, and send micro-batches through it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fnml.core import (
    LayoutError,
    ShapeError,
    axis_tuple,
    mapped_axes,
    path_name,
    refuse_mapped,
    shard_key,
)
from fnml.transforms._layout import split_batch

PyTree = Any
Layer = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
Stack = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


def pipeline(
    layer: Layer,
    mesh: Mesh,
    axis: str = "stage",
    *,
    microbatches: int,
    batch: str | Sequence[str] | None = None,
) -> Stack:
    """Run a stack of layers as a pipeline: ``run(x, stacked) -> (x, ys)``, like ``lax.scan``.

    Device s of the S along ``axis`` holds the layers ``[s * L / S, (s + 1) * L / S)`` and scans
    over them. The batch is cut into M micro-batches; at tick t stage s works on micro-batch
    ``t - s`` and hands the result to its neighbour. After ``M + S - 1`` ticks the last one has left
    the last stage, so ``(S - 1) / (M + S - 1)`` of the time each stage is idle: 43% for S = M = 4,
    9% for S = 4 and M = 32. (Idle stages compute on a micro-batch that is not theirs, and what
    comes out is dropped.) Its derivative is the same pipeline backwards.

    With ``batch`` the examples are divided over further mesh axes first: several pipelines side by
    side. The axes of the mesh that are not named stay with the compiler, as under ``jit``, so that
    a stage can be divided further by shardings.

    Law: ``pipeline(f, mesh, microbatches=M)(x, stacked)[0] == lax.scan(f, x, stacked)[0]`` to
    rounding (products of fewer rows may add up in another order), and gradients likewise, if ``f``
    treats examples independently. Random keys among ``stacked`` are folded with the flat index of
    the micro-batch, ``d * M + m`` on data shard d, as layouts do: with them the law is that of
    :func:`accumulate`, micro-batch by micro-batch.

    Args:
      layer: ``layer(x, inputs) -> (x, y)``, the body of a scan. ``x`` is a tree of arrays
        ``[B, ...]`` that keeps shapes and dtypes; whatever belongs to an example (a mask) has to be
        part of it. Arrays that ``layer`` closes over are the same for all micro-batches. For less
        memory pass ``remat(layer, scope="whole")``: what a stage then keeps are its inputs.
      mesh: the device mesh.
      axis: the mesh axis of the stages. Stacked parameters that lie sharded along it on their
        leading axis (the rule ``{"layers": axis}``) stay where they are.
      microbatches: the number of micro-batches M of one pipeline.
      batch: the mesh axes that divide the batch, if any.

    Returns:
      a function of ``x`` and ``stacked``, a tree of ``[L, ...]``: parameters, keys, the layers'
      numbers. It returns x ``[B, ...]`` and the layers' second outputs ``[L, n, ...]``, one for each
      of the n micro-batches of all data shards.

    Raises:
      LayoutError: the mesh has no such axis, or ``microbatches`` is below 1; when called: S does not
        divide L, the micro-batches do not divide the batch, or this is inside of a ``shard_map``.
      ShapeError: the stacked arrays differ in their leading axis; when called.

    Source: Huang et al. 2018, arXiv:1811.06965, section 2.3.

    >>> mesh = jax.make_mesh((1,), ("stage",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> run = pipeline(lambda x, w: (x * w, None), mesh, microbatches=2)
    >>> run(jnp.array([1.0, 10.0]), jnp.array([2.0, 3.0]))[0].tolist()
    [6.0, 60.0]
    """
    mapped = mapped_axes("pipeline", mesh, {"axis": axis, "batch": batch})
    if microbatches < 1:
        raise LayoutError(f"pipeline got microbatches={microbatches}: expected 1 or more")
    stages, over = mesh.shape[axis], axis_tuple(batch)
    groups = math.prod(mesh.shape[name] for name in over)

    def run(x: PyTree, stacked: PyTree) -> tuple[PyTree, PyTree]:
        refuse_mapped(
            "pipeline",
            "divide the batch with pipeline(..., batch='data') under jit, and its gradient "
            "in time with accumulate",
        )
        _check_layers(stacked, axis, stages)
        split_batch(x, groups * microbatches)
        # check_vma=False: a layer may scan with a carry of plain zeros, or be a kernel.
        out, ys = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P(axis), P(over)),
            out_specs=(P(axis, over), P(axis, over)),
            axis_names=set(mapped),
            check_vma=False,
        )(stacked, x)
        # Every stage gives a row; the last one's is the result.
        return jax.tree.map(lambda rows: rows[-1], out), ys

    def local(stacked: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        stage = lax.axis_index(axis)
        first = lax.axis_index(over) * microbatches if over else jnp.int32(0)
        entering = split_batch(x, microbatches)

        def tick(arrived: PyTree, time: jax.Array) -> tuple[PyTree, tuple[PyTree, PyTree]]:
            index = jnp.clip(time - stage, 0, microbatches - 1)
            enter = jax.tree.map(
                lambda fresh, x: jnp.where(stage == 0, _at(fresh, index), x), entering, arrived
            )
            out, ys = lax.scan(layer, enter, _with_keys(stacked, first + index))
            onward = [(s, s + 1) for s in range(stages - 1)]
            return lax.ppermute(out, axis, onward) if onward else out, (out, ys)

        # An idle stage works on real numbers: zeros might make a layer's derivative infinite, and
        # the zero that it is multiplied with does not undo that.
        arrived = jax.tree.map(lambda x: x[0], entering)
        ticks = jnp.arange(microbatches + stages - 1, dtype=jnp.int32)
        _, (outs, ys) = lax.scan(tick, arrived, ticks)
        out = jax.tree.map(lambda x: x[stages - 1 :].reshape(1, -1, *x.shape[2:]), outs)

        def by_layer(y: jax.Array) -> jax.Array:
            """[ticks, L / S, ...] to [L / S, M, ...]: this stage's own micro-batches."""
            return jnp.moveaxis(lax.dynamic_slice_in_dim(y, stage, microbatches), 0, 1)

        return out, jax.tree.map(by_layer, ys)

    return run


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(x, index, keepdims=False)


def _with_keys(stacked: PyTree, shard: jax.Array) -> PyTree:
    """Fold a micro-batch's index into the random keys of all layers."""

    def fold(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        flat = jax.vmap(lambda key: shard_key(key, shard))(x.reshape(-1))
        return flat.reshape(x.shape)

    return jax.tree.map(fold, stacked)


def _check_layers(stacked: PyTree, axis: str, stages: int) -> None:
    shapes = {path_name(path): x.shape for path, x in jax.tree.leaves_with_path(stacked)}
    if len({shape[:1] for shape in shapes.values()} - {()}) != 1 or () in shapes.values():
        listing = ", ".join(f"{name}: {shape}" for name, shape in shapes.items()) or "no arrays"
        raise ShapeError(f"pipeline takes layers stacked along one leading axis, got {listing}")
    layers = next(iter(shapes.values()))[0]
    if layers % stages:
        fine = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
        raise LayoutError(
            f"pipeline got {layers} layers, which {stages} stages along {axis!r} do not divide: "
            f"use {fine} stages, or a multiple of {stages} layers"
        )
