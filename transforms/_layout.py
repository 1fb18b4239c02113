"""One batch, many layouts: sums over logical shards that merge in one fixed order.

A global batch is ``L`` logical shards. Micro-batches lay them out in time, devices in space.
Each shard yields :class:`Sums`, and sums are added along one binary tree over the flat shard
index, whatever the layout: that is why any layout gives the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnml.core import LayoutError, Mean, Metrics, path_name

PyTree = Any
GradFn = Callable[..., tuple[tuple[jax.Array, Metrics], PyTree]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """What a part of a batch contributes; parts merge by addition.

    Attributes:
      weight: float32 scalar, the part's total weight.
      loss: float32 scalar, the loss times the weight.
      grads: the gradients times the weight, float32 (float64 stays).
      values: the named metrics' :class:`fnml.Mean` pairs.
      stats: the model statistics' pairs.
    """

    weight: jax.Array
    loss: jax.Array
    grads: PyTree
    values: PyTree
    stats: PyTree


def _wide(x: jax.Array) -> jax.Array:
    """Widen a float below 32 bits, so that sums over many shards do not lose what they add."""
    return x.astype(jnp.float32) if jnp.dtype(x.dtype).itemsize < 4 else x


def to_sums(loss: jax.Array, metrics: Metrics, grads: PyTree) -> Sums:
    """Weigh one shard's mean loss and gradients, so that they can be added to other shards'.

    A shard of weight 0 contributes exact zeros, even where its loss is 0 / 0.
    """
    weight = metrics.weight.astype(jnp.float32)

    def weigh(x: jax.Array) -> jax.Array:
        x = _wide(x)
        return jnp.where(weight == 0, jnp.zeros_like(x), x * weight.astype(x.dtype))

    return Sums(weight, weigh(loss), jax.tree.map(weigh, grads), metrics.values, metrics.stats)


def from_sums(sums: Sums, params: PyTree) -> tuple[tuple[jax.Array, Metrics], PyTree]:
    """Divide by the total weight: what a ``grad_fn`` returns, gradients in the params' dtypes."""
    grads = jax.tree.map(
        lambda g, p: Mean(g, sums.weight.astype(g.dtype)).value.astype(p.dtype), sums.grads, params
    )
    loss = Mean(sums.loss, sums.weight.astype(sums.loss.dtype)).value
    return (loss, Metrics(sums.weight, sums.values, sums.stats)), grads


def add(a: PyTree, b: PyTree) -> PyTree:
    """Add two trees leaf by leaf."""
    return jax.tree.map(jnp.add, a, b)


def pairwise(parts: list[PyTree]) -> PyTree:
    """Add up parts along the fixed binary tree: neighbours first, an odd last one moves up.

    Law: for ``n * 2**k`` parts this equals ``pairwise`` over the sums of each block of ``2**k``.

    >>> float(pairwise([1.0, 2.0, 3.0]))
    6.0
    """
    while len(parts) > 1:
        paired = [add(a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = paired + parts[len(paired) * 2 :]
    return jax.tree.map(jnp.asarray, parts[0])


def ordered_sum(shard: Callable[[jax.Array], PyTree], count: int) -> PyTree:
    """Add ``shard(0) .. shard(count - 1)`` along the tree of :func:`pairwise`, one at a time.

    ``shard`` is traced once. Beside one shard's own memory this holds two sums per level of the
    tree for ``count`` a power of two; an odd factor ``q`` of ``count`` adds ``q`` sums.
    """
    block = count & -count

    def subtree(size: int, first: jax.Array) -> PyTree:
        if size == 1:
            return shard(first)
        half = size // 2
        pair = lax.map(lambda i: subtree(half, first + i * half), jnp.arange(2))
        return jax.tree.map(lambda x: x[0] + x[1], pair)

    if block == count:
        return subtree(count, jnp.int32(0))
    blocks = lax.map(lambda i: subtree(block, i * block), jnp.arange(count // block))
    return pairwise([jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(count // block)])


def split_batch(batch: PyTree, count: int) -> PyTree:
    """Reshape every leaf ``[B, ...]`` to ``[count, B / count, ...]``.

    Raises:
      LayoutError: a leaf has no leading axis, the leading axes differ, or ``count`` does not
        divide them; all leaves concerned are listed.
    """
    leaves = jax.tree.leaves_with_path(batch)
    sizes = {path_name(path): (x.shape[0] if x.ndim else None) for path, x in leaves}
    if not sizes:
        raise LayoutError("the batch has no arrays to divide into shards")
    if len(set(sizes.values())) > 1 or None in sizes.values():
        listing = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise LayoutError(
            f"the batch's arrays need one common leading axis to be divided, got {listing}"
        )
    size = next(iter(sizes.values()))
    if size is None or size % count:
        divisors = [n for n in range(1, (size or 1) + 1) if (size or 1) % n == 0]
        near = min(divisors, key=lambda n: abs(n - count))
        raise LayoutError(
            f"a batch of {size} examples cannot be divided into {count} equal shards: "
            f"use {near} shards, or a batch size that is a multiple of {count}"
        )
    return jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)
