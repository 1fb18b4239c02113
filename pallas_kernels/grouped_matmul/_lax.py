"""The form for every platform: tile after tile, each with the matrix of its group."""

import jax
import jax.numpy as jnp
from jax import lax

from fnml.pallas_kernels._dtypes import wide
from fnml.pallas_kernels.grouped_matmul._blocks import lax_tile
from fnml.pallas_kernels.grouped_matmul._visits import Visits, plan


def _padded(x: jax.Array, tile: int) -> jax.Array:
    return jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0)))


def _own(visit: Visits, tile: int) -> jax.Array:
    """Tell which rows [tile, 1] of its tile a visit owns."""
    row = visit.tile * tile + jnp.arange(tile)[:, None]
    return (row >= visit.start) & (row < visit.stop)


def _rows(x: jax.Array, visit: Visits, tile: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, visit.tile * tile, tile, 0)


def forward(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, transpose: bool = False
) -> jax.Array:
    """Return [N, F] for x [N, D] and w [E, D, F], or w [E, F, D] if it is to be transposed."""
    N, tile, sums = x.shape[0], lax_tile(x.shape[0], w.shape[0]), wide(x.dtype)
    padded = _padded(x, tile)
    over = ((1,), (1 if transpose else 0,))

    def visit(out: jax.Array, at: Visits) -> tuple[jax.Array, None]:
        def product(out: jax.Array) -> jax.Array:
            matrix = lax.dynamic_index_in_dim(w, at.group, 0, keepdims=False).astype(x.dtype)
            part = lax.dot_general(
                _rows(padded, at, tile), matrix, (over, ((), ())), preferred_element_type=sums
            )
            part = jnp.where(_own(at, tile), part.astype(x.dtype), _rows(out, at, tile))
            return lax.dynamic_update_slice_in_dim(out, part, at.tile * tile, 0)

        return lax.cond(at.stop > at.start, product, lambda out: out, out), None

    out = jnp.zeros((padded.shape[0], w.shape[1 if transpose else 2]), x.dtype)
    out, _ = lax.scan(visit, out, plan(group_sizes, N, tile))
    return out[:N]


def backward(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of x and w."""
    return forward(grad, w, group_sizes, transpose=True), weight_gradient(
        x, grad, group_sizes, like=w
    )


def weight_gradient(
    x: jax.Array, grad: jax.Array, group_sizes: jax.Array, *, like: jax.Array
) -> jax.Array:
    """Return [E, D, F]: for each group, x's rows [D, n] times the gradient's [n, F]."""
    N, tile = x.shape[0], lax_tile(x.shape[0], like.shape[0])
    padded, grads, sums = _padded(x, tile), _padded(grad, tile), wide(like.dtype)

    def visit(out: jax.Array, at: Visits) -> tuple[jax.Array, None]:
        def product(out: jax.Array) -> jax.Array:
            rows = jnp.where(_own(at, tile), _rows(padded, at, tile), 0)
            part = lax.dot_general(
                rows,
                _rows(grads, at, tile),
                (((0,), (0,)), ((), ())),
                preferred_element_type=sums,
            )
            old = lax.dynamic_index_in_dim(out, at.group, 0, keepdims=False)
            return lax.dynamic_update_index_in_dim(out, old + part, at.group, 0)

        return lax.cond(at.stop > at.start, product, lambda out: out, out), None

    zeros = jnp.zeros(like.shape, sums)
    return lax.scan(visit, zeros, plan(group_sizes, N, tile))[0].astype(like.dtype)
