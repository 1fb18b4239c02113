"""The loss in chunks of tokens: one chunk's logits are in memory at a time."""

import jax
import jax.numpy as jnp
from jax import lax

from fnml.pallas_kernels._dtypes import wide
from fnml.pallas_kernels.linear_cross_entropy._tiles import Plan, loss, slope


def _chunks(plan: Plan, N: int, *arrays: jax.Array) -> list[jax.Array]:
    """Cut arrays of N rows into chunks, the last one filled up with rows of weight 0."""
    chunk = min(plan.chunk, N)
    count = -(-N // chunk)

    def cut(x: jax.Array) -> jax.Array:
        padding = jnp.zeros((count * chunk - N, *x.shape[1:]), x.dtype)
        return jnp.concatenate([x, padding]).reshape(count, chunk, *x.shape[1:])

    return [cut(x) for x in arrays]


def _parts(plan: Plan, x: jax.Array, w: jax.Array, labels: jax.Array) -> tuple:
    """Return what one chunk's losses and slopes are made of, from its logits [chunk, V]."""
    logits = lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=wide(x.dtype))
    hit = labels[:, None] == jnp.arange(plan.classes, dtype=jnp.int32)[None, :]
    # A gather spares one pass over the logits; like a comparison it finds 0 for a label beyond V.
    index = jnp.where(labels < 0, plan.classes, labels)[:, None]
    chosen = jnp.take_along_axis(logits, index, 1, mode="fill", fill_value=0)[:, 0]
    mean = logits.mean(-1) if plan.smoothing else chosen
    top = logits.max(-1, keepdims=True)
    powers = jnp.exp(logits - top)
    sums = powers.sum(-1, keepdims=True)
    log = top + jnp.log(sums)
    return loss(plan, log[:, 0], chosen, mean), powers, sums, log, hit


def losses(
    plan: Plan, x: jax.Array, w: jax.Array, labels: jax.Array, weights: jax.Array
) -> jax.Array:
    """Return the losses [N]."""
    del weights
    N = x.shape[0]

    def one(_: None, inputs: tuple) -> tuple[None, jax.Array]:
        x, labels = inputs
        return None, _parts(plan, x, w, labels)[0]

    _, out = lax.scan(one, None, tuple(_chunks(plan, N, x, labels)))
    return out.reshape(-1)[:N]


def losses_and_grads(
    plan: Plan, x: jax.Array, w: jax.Array, labels: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the losses [N], and the gradients of their weighted sum by x and w."""
    (N, D), sums = x.shape, wide(x.dtype)

    # Summed as [V, D], which is measurably faster on a CPU than [D, V], and turned once.
    def one(turned: jax.Array, inputs: tuple) -> tuple[jax.Array, tuple]:
        x, labels, weights = inputs
        losses, powers, totals, log, hit = _parts(plan, x, w, labels)
        slopes = slope(plan, powers / totals, log, hit, weights[:, None]).astype(x.dtype)
        grad_x = lax.dot_general(slopes, w, (((1,), (1,)), ((), ())), preferred_element_type=sums)
        more = lax.dot_general(slopes, x, (((0,), (0,)), ((), ())), preferred_element_type=sums)
        return turned + more, (losses, grad_x.astype(x.dtype))

    zeros = jnp.zeros((w.shape[1], D), sums)
    turned, (out, grad_x) = lax.scan(one, zeros, tuple(_chunks(plan, N, x, labels, weights)))
    return out.reshape(-1)[:N], grad_x.reshape(-1, D)[:N], turned.T.astype(w.dtype)
