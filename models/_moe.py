"""A feed-forward layer of several experts, of which each token is sent to a few."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fnml.core import ShapeError
from fnml.models._linear import linear
from fnml.models._swiglu import swiglu
from fnml.pallas_kernels import grouped_matmul

PyTree = Any


class Routes(NamedTuple):
    """Where tokens go.

    Attributes:
      experts: int32 [N, k], each token's experts, the likeliest first.
      weights: float32 [N, k], what each of them counts.
      sizes: int32 [E], the tokens of each expert; they add up to N * k.
      balance: float32 scalar, 1 where all experts get equal shares, E where one gets all.
    """

    experts: jax.Array
    weights: jax.Array
    sizes: jax.Array
    balance: jax.Array


def route(x: jax.Array, router: jax.Array, experts_per_token: int) -> Routes:
    """Choose experts for the tokens ``x`` [N, D] by a softmax over ``x @ router`` [N, E].

    A token's k experts are those of the largest probabilities. These are the weights: as they
    are for k = 1, divided by their sum for k > 1. ``balance`` is ``E * sum(f * P)`` with f the
    share of the tokens that an expert gets and P its mean probability: add about 0.01 of it to
    the loss, and the router is paid for spreading tokens.

    Source: Fedus, Zoph and Shazeer 2021, arXiv:2101.03961, equations 1, 2 and 4 to 6.

    Raises:
      ShapeError: there are fewer experts than a token is to be sent to.

    >>> import jax.numpy as jnp
    >>> routes = route(jnp.eye(2), jnp.eye(2), 1)
    >>> routes.experts.tolist(), routes.sizes.tolist(), round(float(routes.balance), 6)
    ([[0], [1]], [1, 1], 1.0)
    """
    N, E = x.shape[0], router.shape[1]
    if not 1 <= experts_per_token <= E:
        raise ShapeError(
            f"route got a router {router.shape} and experts_per_token={experts_per_token}: "
            f"expected 1 to {E}"
        )
    shares = jax.nn.softmax(linear(x.astype(jnp.float32), router), axis=-1)
    weights, experts = lax.top_k(shares, experts_per_token)
    if experts_per_token > 1:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    hit = experts.reshape(-1, 1) == jnp.arange(E, dtype=experts.dtype)[None, :]
    sizes = jnp.sum(hit, axis=0, dtype=jnp.int32)
    share = sizes.astype(jnp.float32) / (N * experts_per_token)
    return Routes(experts, weights, sizes, E * jnp.sum(share * jnp.mean(shares, axis=0)))


# Both ways a gather: the derivative that autodiff finds is a scatter, which adds in any order.
@jax.custom_vjp
def _permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    return x.at[order].get(mode="promise_in_bounds", unique_indices=True)


def _forward(
    x: jax.Array, order: jax.Array, inverse: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _permute(x, order, inverse), (order, inverse)


def _backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, None, None]:
    order, inverse = saved
    return _permute(grad, inverse, order), None, None


_permute.defvjp(_forward, _backward)


def run_experts(
    rows: jax.Array, params: PyTree, chosen: jax.Array, weights: jax.Array, sizes: jax.Array
) -> jax.Array:
    """Return the mixed output of each token's experts [N, D], for rows [N, D].

    ``chosen`` and ``weights`` are [N, k], ``sizes`` [E] are the tokens of each of the E experts that
    ``params`` holds. A choice of E or more is an expert that lives elsewhere: it adds nothing.

    >>> import jax.numpy as jnp
    >>> weights = {"gate": jnp.ones((2, 3, 5)), "up": jnp.ones((2, 3, 5)), "down": jnp.ones((2, 5, 3))}
    >>> chosen, sizes = jnp.array([[1], [2]]), jnp.array([0, 1])
    >>> run_experts(jnp.ones((2, 3)), weights, chosen, jnp.ones((2, 1)), sizes).astype(jnp.int32).tolist()
    [[42, 42, 42], [0, 0, 0]]
    """
    (N, D), k = rows.shape, chosen.shape[1]
    order = jnp.argsort(chosen.reshape(-1), stable=True)  # [N * k]
    inverse = jnp.argsort(order)
    copies = jnp.broadcast_to(rows[:, None, :], (N, k, D)).reshape(N * k, D)
    sent = _permute(copies, order, inverse)
    gate, up = (grouped_matmul(sent, params[name], sizes) for name in ("gate", "up"))
    out = grouped_matmul(swiglu(gate, up), params["down"], sizes)
    back = _permute(out, inverse, order).reshape(N, k, D)
    return jnp.sum(back * weights[:, :, None].astype(back.dtype), axis=1)


def moe(x: jax.Array, params: PyTree, *, experts_per_token: int = 2) -> tuple[jax.Array, Routes]:
    """Return the mixed output of each token's experts, like ``x`` [..., D], and the routes.

    ``params`` has ``"router"`` [D, E], ``"gate"`` and ``"up"`` [E, D, M], ``"down"`` [E, M, D]: each
    expert is ``swiglu(x @ gate, x @ up) @ down``. Tokens are sorted by expert and every one is
    computed: none is dropped, whatever the balance.

    Law: with one expert it is the dense layer; permuting the experts changes nothing, to rounding.

    Source: Fedus, Zoph and Shazeer 2021, arXiv:2101.03961, section 2; without dropping: Gale et
    al. 2022, arXiv:2211.15841.

    >>> import jax.numpy as jnp
    >>> weights = {"gate": jnp.ones((4, 3, 5)), "up": jnp.ones((4, 3, 5)), "down": jnp.ones((4, 5, 3))}
    >>> y, routes = moe(jnp.ones((2, 7, 3)), {"router": jnp.ones((3, 4)), **weights})
    >>> y.shape, int(routes.sizes.sum())
    ((2, 7, 3), 28)
    """
    rows = x.reshape(-1, x.shape[-1])  # [N, D]
    routes = route(rows, params["router"], experts_per_token)
    y = run_experts(rows, params, routes.experts, routes.weights, routes.sizes)
    return y.reshape(x.shape), routes
