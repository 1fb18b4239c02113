"""Trade memory for time: recompute activations in the backward pass."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend import core as jex_core

from fnml.core import ConfigError, nearest
from fnml.transforms._walk import Rules, bodies, trace, walk

PyTree = Any

POLICIES: dict[str, Any] = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
}


def _policy(policy: str | tuple[str, ...] | Callable[..., Any]) -> Any:
    if callable(policy):
        return policy
    if isinstance(policy, tuple):
        return jax.checkpoint_policies.save_only_these_names(*policy)
    if policy not in POLICIES:
        raise ConfigError(
            f"remat has no policy {policy!r}; it takes {', '.join(POLICIES)}, a tuple of "
            f"checkpoint names, or a function of jax.checkpoint_policies.{nearest(policy, POLICIES)}"
        )
    return POLICIES[policy]


def _has_scan(_: Any, eqn: Any) -> bool:
    """Tell whether an equation is a call that holds a scan, or a call that does."""
    return eqn.primitive.name == "jit" and any(
        inner.primitive.name == "scan" or _has_scan(_, inner)
        for body in bodies(eqn)
        for inner in body.jaxpr.eqns
    )


def _scan(params: dict[str, Any], values: list[Any], policy: Any) -> list[Any]:
    """Bind a scan again with its body rematerialised."""
    consts = params["num_consts"]
    carried = consts + params["num_carry"]
    fixed, init, xs = values[:consts], values[consts:carried], values[carried:]
    run = jax.checkpoint(jex_core.jaxpr_as_fun(params["jaxpr"]), policy=policy, prevent_cse=False)

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        out = run(*fixed, *carry, *x)
        return out[: len(init)], out[len(init) :]

    # Never unrolled: in straight-line code XLA finds that what is recomputed is there already.
    carry, ys = lax.scan(body, init, xs, params["length"], params["reverse"])
    return [*carry, *ys]


def remat(
    function: Callable[..., PyTree],
    policy: str | tuple[str, ...] | Callable[..., Any] = "nothing",
    *,
    scope: str = "layers",
) -> Callable[..., PyTree]:
    """Recompute activations in the backward pass instead of keeping them.

    Law: ``remat(f) == f`` and ``grad(remat(f)) == grad(f)`` up to rounding: every operation is
    the same, but a compiler fuses recomputed ones otherwise, which can change the last bits.

    Args:
      function: a loss, or any function that is differentiated later; it has to come before
        ``jax.value_and_grad``, since there is nothing left to recompute after it.
      policy: what to keep: ``"nothing"``, ``"dots"`` (results of matrix products),
        ``"dots_no_batch"`` (those without batch dimensions), ``"everything"``, a tuple of names
        given with ``jax.ad_checkpoint.checkpoint_name``, or a policy function of JAX.
      scope: ``"layers"`` rematerialises the body of every outermost ``lax.scan`` on its own, so
        that the backward pass holds one layer's activations at a time; scans inside ``cond``,
        ``while`` or a function with its own derivative are left alone. ``"whole"``
        rematerialises the function as one piece.

    Raises:
      ConfigError: the policy or the scope is unknown.

    >>> import jax, jax.numpy as jnp
    >>> def deep(w):
    ...     return jax.lax.scan(lambda x, w: (jnp.sin(x * w), None), 1.0, w)[0]
    >>> w = jnp.arange(3.0)
    >>> bool(jnp.allclose(jax.grad(remat(deep))(w), jax.grad(deep)(w)))
    True
    """
    chosen = _policy(policy)
    if scope not in ("layers", "whole"):
        raise ConfigError(f"remat's scope is 'layers' or 'whole', got {scope!r}")

    @functools.wraps(function)
    def whole(*args: Any, **options: Any) -> PyTree:
        # Options stay outside the trace: `train=True` has to reach the function as a bool.
        return jax.checkpoint(functools.partial(function, **options), policy=chosen)(*args)

    @functools.wraps(function)
    def layers(*args: Any, **options: Any) -> PyTree:
        def rewrite(eqn: Any, values: list[Any]) -> list[Any] | None:
            return _scan(eqn.params, values, chosen) if eqn.primitive.name == "scan" else None

        traced = trace(function, args, options)
        out, _ = walk(traced.closed, traced.flat, Rules(rewrite, wanted=_has_scan))
        return jax.tree.unflatten(traced.tree, out)

    return layers if scope == "layers" else whole
