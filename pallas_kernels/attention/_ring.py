"""Causal attention over a sequence that is divided along a ring of devices."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fnml.pallas_kernels._dtypes import wide
from fnml.pallas_kernels._implementation import Choice, choose
from fnml.pallas_kernels.attention._attention import _backward as part_backward
from fnml.pallas_kernels.attention._attention import _forward as part_forward
from fnml.pallas_kernels.attention._blocks import WORTH
from fnml.pallas_kernels.attention._support import refusals
from fnml.pallas_kernels.attention._tiles import Extras, Plan


class Ring(NamedTuple):
    """Where the devices stand: ``size`` of them along the mapped ``axis``."""

    axis: str
    size: int

    def onward(self, tree: Any) -> Any:
        """Hand arrays to the next device, and get those of the one before."""
        return lax.ppermute(tree, self.axis, [(d, (d + 1) % self.size) for d in range(self.size)])

    def home(self, chunk: int) -> int:
        """Return which device computes a chunk: d has the chunks d and 2 N - 1 - d of 2 N."""
        return min(chunk, 2 * self.size - 1 - chunk)

    def deal(self, x: jax.Array, *, back: bool = False) -> jax.Array:
        """Exchange the halves of [B, 2 c, ...] so that each device has an early and a late chunk.

        A causal query sees the keys before it, so whoever holds the end of the sequence would work
        through all of it while the others wait: with chunks d and 2 N - 1 - d all have as much to do.
        ``back`` brings every chunk to where it came from.
        """
        even = lax.axis_index(self.axis) % 2 == 0
        # Chunk 2 d, or 2 d + 1, of device d goes to a device of its own: half a device's rows each.
        routes = [[(d, self.home(2 * d + half)) for d in range(self.size)] for half in (0, 1)]
        low, high = jnp.split(x, 2, axis=1)
        if back:
            first, second = jnp.where(even, low, high), jnp.where(even, high, low)
            pair = zip((first, second), routes, strict=True)
            low, high = (
                lax.ppermute(part, self.axis, [(end, start) for start, end in route])
                for part, route in pair
            )
        else:
            # Even chunks below N, and so odd ones above, come from first halves to even devices.
            first, second = (
                lax.ppermute(part, self.axis, route)
                for part, route in zip((low, high), routes, strict=True)
            )
            low, high = jnp.where(even, first, second), jnp.where(even, second, first)
        return jnp.concatenate([low, high], 1)


def ring_attention(q: jax.Array, k: jax.Array, v: jax.Array, axis: str, size: int) -> jax.Array:
    """Return causal attention for this device's part of a sequence, inside ``shard_map``.

    ``q`` is [B, T / N, H, D], ``k`` and ``v`` are [B, T / N, K, D]: the N = ``size`` devices along
    ``axis`` hold consecutive parts, of an even length. Keys and values go around the ring, and with
    them their gradients on the way back; a device holds its own part, the one it reads and the next.

    Source: Liu, Zaharia and Abbeel 2023, arXiv:2310.01889, algorithm 1; early and late chunks:
    Grattafiori et al. 2024, arXiv:2407.21783, section 3.3.2.
    """
    ring = Ring(axis, size)
    q, k, v = (ring.deal(x) for x in (q, k, v))
    return ring.deal(_around(ring, q, k, v), back=True)


class _Part(NamedTuple):
    """Rows of this device's queries against some of a visitor's keys: both start where a half does."""

    plan: Plan
    rows: slice
    keys: slice

    def cut(self, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        return q[:, self.rows], k[:, self.keys], v[:, self.keys]

    def choice(self, q: jax.Array, k: jax.Array) -> Choice:
        reasons = refusals(self.plan, q, k, Extras())
        return choose("attention", "auto", reasons, worth=min(q.shape[1], k.shape[1]) >= WORTH)


def _parts(q: jax.Array) -> tuple[_Part, _Part, _Part]:
    """Say what meets of the device's own keys, of an earlier device's, and of a later one's.

    The own halves are in order, so causal by index is causal by position. All of an earlier device's
    first half lies before both of ours and its second half behind both; a later device's halves lie
    behind our first and before our second.
    """
    half, scale = q.shape[1] // 2, q.shape[3] ** -0.5
    whole, low, high = slice(None), slice(half), slice(half, None)
    full = Plan(scale)
    return (
        _Part(Plan(scale, right=0), whole, whole),
        _Part(full, whole, low),
        _Part(full, high, whole),
    )


def _put(whole: jax.Array, part: jax.Array, where: slice, axis: int) -> jax.Array:
    """Replace a part of an array along an axis."""
    return lax.dynamic_update_slice_in_dim(whole, part, where.start or 0, axis)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _around(ring: Ring, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _forward(ring, q, k, v)[0]


class _Read(NamedTuple):
    """What queries have read so far: output [B, T, H, D] and log of the sum [B, H, T], both wide."""

    out: jax.Array
    log: jax.Array


def _forward(
    ring: Ring, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    own, earlier, later = _parts(q)

    def read(part: _Part, kv: tuple[jax.Array, jax.Array]) -> _Read:
        rows, keys, values = part.cut(q, *kv)
        out, saved = part_forward(part.choice(rows, keys), part.plan, rows, keys, values, Extras())
        return _Read(out.astype(wide(out.dtype)), saved[-1])

    def merge(part: _Part, before: _Read, kv: tuple[jax.Array, jax.Array]) -> _Read:
        more = read(part, kv)
        old = _Read(before.out[:, part.rows], before.log[..., part.rows])
        log = jnp.logaddexp(old.log, more.log)
        old_share, share = (
            jnp.exp(x.log - log).swapaxes(1, 2)[..., None]  # [B, T, H, 1]
            for x in (old, more)
        )
        out = old_share * old.out + share * more.out
        return _Read(_put(before.out, out, part.rows, 1), _put(before.log, log, part.rows, 2))

    def visit(seen: _Read, kv: tuple[jax.Array, jax.Array], turn: Any) -> _Read:
        return lax.cond(
            turn <= lax.axis_index(ring.axis),
            partial(merge, earlier),
            partial(merge, later),
            seen,
            kv,
        )

    def turn(carry: tuple, index: jax.Array) -> tuple[tuple, None]:
        seen, kv = carry
        # Handed on before it is read: the transfer goes beside the computation.
        return (visit(seen, kv, index), ring.onward(kv)), None

    seen, kv = read(own, (k, v)), (k, v)
    if ring.size > 1:
        carry = seen, ring.onward(kv)
        turns = jnp.arange(1, ring.size - 1, dtype=jnp.int32)
        (seen, kv), _ = lax.scan(turn, carry, turns)
        seen = visit(seen, kv, ring.size - 1)
    out = seen.out.astype(q.dtype)
    return out, (q, k, v, out, seen.log)


def _backward(
    ring: Ring, saved: tuple[jax.Array, ...], grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v, out, log = saved
    own, earlier, later = _parts(q)
    sums = wide(q.dtype)

    def add(part: _Part, sofar: tuple, kv: tuple[jax.Array, jax.Array]) -> tuple:
        rows, keys, values = part.cut(q, *kv)
        known = (rows, keys, values, Extras(), out[:, part.rows], log[..., part.rows])
        # With the sums over all keys, each part's gradient is its share of the whole one.
        more = part_backward(part.choice(rows, keys), part.plan, known, grad[:, part.rows])[:3]
        where = (part.rows, part.keys, part.keys)
        return tuple(
            _put(total, total[:, at] + x.astype(sums), at, 1)
            for total, at, x in zip(sofar, where, more, strict=True)
        )

    def visit(sofar: tuple, kv: tuple[jax.Array, jax.Array], turn: Any) -> tuple:
        return lax.cond(
            turn <= lax.axis_index(ring.axis), partial(add, earlier), partial(add, later), sofar, kv
        )

    def turn(carry: tuple, index: jax.Array) -> tuple[tuple, None]:
        (grad_q, *grad_kv), kv = carry
        sofar = (grad_q, *ring.onward(tuple(grad_kv)))
        return (visit(sofar, kv, index), ring.onward(kv)), None

    kv = k, v
    grads = add(own, tuple(jnp.zeros(x.shape, sums) for x in (q, k, v)), kv)
    if ring.size > 1:
        turns = jnp.arange(1, ring.size - 1, dtype=jnp.int32)
        (grads, kv), _ = lax.scan(turn, (grads, ring.onward(kv)), turns)
        grads = visit((grads[0], *ring.onward(grads[1:])), kv, ring.size - 1)
        grads = (grads[0], *ring.onward(grads[1:]))
    grad_q, grad_k, grad_v = (x.astype(q.dtype) for x in grads)
    return grad_q, grad_k, grad_v


_around.defvjp(_forward, _backward)
