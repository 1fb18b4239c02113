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

from fnml.core import LayoutError, Metrics, path_name, shard_key

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


def _rounded(product: jax.Array, loss: jax.Array) -> jax.Array:
    """Keep a product with the weight apart from the addition that takes it.

    XLA:CPU would contract the two into a fused multiply-add where a layout brings them together,
    and not in another: one rounding less, and other bits. It may not see through the integers, nor
    know whether the loss is a number (of a weight it may know the sign).
    """
    integers = jnp.uint32 if product.dtype.itemsize == 4 else jnp.uint64
    bits = lax.bitcast_convert_type(product, integers) ^ jnp.isnan(loss).astype(integers)
    return lax.bitcast_convert_type(bits, product.dtype)


def to_sums(loss: jax.Array, metrics: Metrics, grads: PyTree) -> Sums:
    """Weigh one shard's mean loss and gradients, so that they can be added to other shards'.

    A shard of weight 0 contributes exact zeros, even where its loss is 0 / 0.
    """
    weight = metrics.weight.astype(jnp.float32)

    def weigh(x: jax.Array) -> jax.Array:
        x = _wide(x)
        return jnp.where(weight == 0, jnp.zeros_like(x), _rounded(x * weight.astype(x.dtype), loss))

    return Sums(weight, weigh(loss), jax.tree.map(weigh, grads), metrics.values, metrics.stats)


def from_sums(sums: Sums, params: PyTree) -> tuple[tuple[jax.Array, Metrics], PyTree]:
    """Divide by the total weight: what a ``grad_fn`` returns, gradients in the params' dtypes."""
    nothing = sums.weight == 0
    weight = jnp.where(nothing, 1.0, sums.weight)

    def mean(total: jax.Array) -> jax.Array:
        # XLA may or may not turn a division into a product with the reciprocal, depending on what
        # stands around it, and the two round differently: the product is spelt out and kept apart.
        inverse = lax.optimization_barrier(1 / weight.astype(total.dtype))
        return jnp.where(nothing, jnp.zeros_like(total), total * inverse)

    grads = jax.tree.map(lambda g, p: mean(g).astype(p.dtype), sums.grads, params)
    return (mean(sums.loss), Metrics(sums.weight, sums.values, sums.stats)), grads


@dataclass(frozen=True)
class Laid:
    """A gradient function over several logical shards, laid out in time, in space, or both.

    It is called as any ``grad_fn``; a layout transform applied to it reads its sums instead, so
    that nested layouts agree on one flat shard index, one key per shard and one order of addition.

    Attributes:
      shards: the number of logical shards that a call's batch is made of.
      sums: ``sums(params, batch, key, first, options) -> Sums`` of the shards with flat indices
        ``first .. first + shards - 1``, which ``batch`` holds.
      devices: the number of devices that compute them; 1 for a layout in time alone.
    """

    shards: int
    sums: Callable[[PyTree, PyTree, jax.Array, jax.Array, dict[str, Any]], Sums]
    devices: int = 1

    def __call__(
        self, params: PyTree, batch: PyTree, key: jax.Array, **options: Any
    ) -> tuple[tuple[jax.Array, Metrics], PyTree]:
        return from_sums(self.sums(params, batch, key, jnp.int32(0), options), params)


@dataclass(frozen=True)
class Whole:
    """A gradient function of a whole batch, which no layout may divide.

    Attributes:
      call: the function.
      name: the transform that made it.
      why: the rule, and the order that works.
    """

    call: GradFn
    name: str
    why: str

    def __call__(
        self, params: PyTree, batch: PyTree, key: jax.Array, **options: Any
    ) -> tuple[tuple[jax.Array, Metrics], PyTree]:
        return self.call(params, batch, key, **options)


def laid(grad_fn: GradFn) -> Laid:
    """Return ``grad_fn`` as a layout: itself if it is one, else as a single shard.

    Raises:
      LayoutError: ``grad_fn`` is one of a whole batch.
    """
    if isinstance(grad_fn, Laid):
        return grad_fn
    if isinstance(grad_fn, Whole):
        raise LayoutError(f"{grad_fn.name} cannot go inside a layout: {grad_fn.why}")

    def sums(
        params: PyTree, batch: PyTree, key: jax.Array, first: jax.Array, options: dict[str, Any]
    ) -> Sums:
        (loss, metrics), grads = grad_fn(params, batch, shard_key(key, first), **options)
        return to_sums(loss, metrics, grads)

    return Laid(1, sums)


def refuse_laid(grad_fn: GradFn, name: str, cure: str | None = None) -> None:
    """Refuse a layout, or a function of a whole batch, where one of a single shard is needed.

    Raises:
      LayoutError: ``grad_fn`` is one of these; the message names the order that works: ``cure``,
        or the layout outside.
    """
    if isinstance(grad_fn, Whole):
        raise LayoutError(f"{name} cannot go around {grad_fn.name}: {grad_fn.why}")
    if isinstance(grad_fn, Laid):
        inside = (
            f"it changes how one shard's gradients are computed, so it goes inside: "
            f"accumulate({name}(grad_fn, ...), n) or data_parallel({name}(grad_fn, ...), mesh)"
        )
        raise LayoutError(f"{name} cannot go around a layout: {cure or inside}")


def check_blocks(inner: Laid, name: str) -> None:
    """Refuse an inner layout whose sums are no subtree of the fixed order of addition.

    Raises:
      LayoutError: the inner number of shards is not a power of two.
    """
    if inner.shards & (inner.shards - 1):
        raise LayoutError(
            f"{name} over a layout of {inner.shards} shards would add in another order than the "
            f"flat batch: the inner number of shards has to be a power of two. Put the "
            f"accumulation by {inner.shards & -inner.shards} inside and the rest outside"
        )


def check_one_device(inner: Laid, name: str) -> None:
    """Refuse to divide over devices what is divided over devices already.

    Raises:
      LayoutError: ``inner`` computes on several devices.
    """
    if inner.devices > 1:
        raise LayoutError(
            f"{name} cannot go around a layout over {inner.devices} devices: divide over devices "
            "once and lay the rest out in time, as in accumulate(data_parallel(grad_fn, mesh), n)"
        )


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

    ``shard`` is traced once. Beside one shard's own memory this holds one sum per level of the
    tree for ``count`` a power of two; an odd factor ``q`` of ``count`` adds ``q`` sums.
    """
    if count == 1:
        return shard(jnp.int32(0))
    block = count & -count
    # Its jaxpr is kept between finding the shapes and the loop; inline, it leaves no call behind.
    shard = jax.jit(shard, inline=True)
    nothing = jax.tree.map(_nothing, jax.eval_shape(shard, jnp.int32(0)))

    def subtree(size: int, first: jax.Array) -> PyTree:
        if size == 1:
            return shard(first)
        half = size // 2

        def merge(total: PyTree, i: jax.Array) -> tuple[PyTree, None]:
            return add(total, subtree(half, first + i * half)), None

        return lax.scan(merge, nothing, jnp.arange(2, dtype=jnp.int32))[0]

    if block == count:
        return subtree(count, jnp.int32(0))
    starts = jnp.arange(0, count, block, dtype=jnp.int32)
    blocks = lax.map(lambda first: subtree(block, first), starts)
    return pairwise([jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(count // block)])


def _nothing(x: Any) -> jax.Array:
    """Return what leaves every bit of a number that is added to it: of floats, minus zero."""
    zero = -0.0 if jnp.issubdtype(x.dtype, jnp.inexact) else 0
    full = jnp.full(x.shape, zero, x.dtype)
    # Under shard_map, a sum that differs between devices starts as one that may differ.
    kind = getattr(x, "manual_axis_type", None)
    varies = tuple(kind.varying) if kind else tuple(getattr(x, "vma", ()))
    return lax.pcast(full, varies, to="varying") if varies else full


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
