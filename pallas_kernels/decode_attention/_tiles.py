"""What one block of keys adds to what some queries read.

A block holds its tokens' keys of all heads one after another: column c of a block is head c % K of
token c // K. All queries are multiplied with all columns at once, and a query ignores the heads
that are not its own: the matrix unit has nothing else to do while the next block is on its way.
"""

import jax
import jax.numpy as jnp
from jax import lax

State = tuple[jax.Array, jax.Array, jax.Array]


def seen(
    rows: int, columns: int, t: int, K: int, start: jax.Array, length: jax.Array, window: int | None
) -> jax.Array:
    """Tell which of the rows [t * H] see which of the columns [S * K] of a block.

    ``start`` is the position of the block's first token, ``length`` that of the sequence's end.
    """
    H = rows // t
    row = lax.broadcasted_iota(jnp.int32, (rows, columns), 0)
    column = lax.broadcasted_iota(jnp.int32, (rows, columns), 1)
    query = length - t + lax.div(row, jnp.int32(H))
    key = start + lax.div(column, jnp.int32(K))
    own = lax.div(lax.rem(row, jnp.int32(H)), jnp.int32(H // K)) == lax.rem(column, jnp.int32(K))
    visible = own & (key <= query)
    return visible if window is None else visible & (key > query - window)


def by_column(scale: jax.Array) -> jax.Array:
    """Lay out the scales [K, S] of a block's tokens along its columns: [1, S * K]."""
    K, S = scale.shape
    token = lax.broadcasted_iota(jnp.int32, (S, S * K), 0)
    column = lax.broadcasted_iota(jnp.int32, (S, S * K), 1)
    chosen = (token == lax.div(column, jnp.int32(K))).astype(jnp.float32)
    # A product with zeros and ones moves numbers between lanes; at full precision it is exact.
    spread = lax.dot_general(
        scale, chosen, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST
    )
    head = lax.broadcasted_iota(jnp.int32, (K, S * K), 0)
    column = lax.broadcasted_iota(jnp.int32, (K, S * K), 1)
    own = head == lax.rem(column, jnp.int32(K))
    return jnp.sum(jnp.where(own, spread, 0.0), axis=0, keepdims=True)


def scores(
    q: jax.Array, k: jax.Array, scale: jax.Array | None, soft_cap: float | None
) -> jax.Array:
    """Return float32 [R, C] of queries [R, D] that are scaled already, and keys [C, D]."""
    out = lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    if scale is not None:
        out = out * jnp.broadcast_to(scale, out.shape)
    return out if soft_cap is None else soft_cap * jnp.tanh(out / soft_cap)


def add(
    state: State, scores: jax.Array, seen: jax.Array, v: jax.Array, scale: jax.Array | None
) -> State:
    """Fold a block into the running maximum [R, 1], sum [R, 1] and output [R, D]."""
    top, total, out = state
    # A finite floor: the difference of two -inf would be NaN.
    scores = jnp.where(seen, scores, -1e30)
    higher = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - higher), 0.0)
    fade = jnp.exp(top - higher)
    total = total * fade + jnp.sum(weights, axis=1, keepdims=True)
    if scale is not None:
        weights = weights * jnp.broadcast_to(scale, weights.shape)
    read = lax.dot_general(
        weights.astype(v.dtype), v, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    return higher, total, out * fade + read
