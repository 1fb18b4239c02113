"""Compute in float64 what a function computes in less."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex_core

PyTree = Any

_CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "checkpoint",
    "remat",
    "remat2",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
}
# What these return depends on how their argument is stored.
_BY_REPRESENTATION = {"bitcast_convert_type", "nextafter"}


def widen(function: Callable[..., PyTree], *args: Any) -> Callable[..., PyTree]:
    """Return ``function``, traced on ``args``, with every float widened to float64.

    The traced operations are those of the function's own precision, random draws included; only
    their arithmetic is in float64. It is for values, not for derivatives: custom derivatives are
    dropped. Operations whose body is not looked into (Pallas kernels, ``shard_map``) stay in
    their own precision.

    The result has to be called within ``jax.enable_x64(True)``, on arguments like ``args``.

    >>> def lossy(x):
    ...     return (x.astype(jnp.bfloat16) + 1).astype(jnp.float32)
    >>> wide = widen(lossy, jnp.float32(0))
    >>> with jax.enable_x64(True):
    ...     float(lossy(jnp.float32(1e-4))), float(wide(jnp.float64(1e-4)))
    (1.0, 1.0001)
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    tree = jax.tree.structure(shape)

    def wide(*args: Any) -> PyTree:
        return jax.tree.unflatten(tree, _evaluate(closed, jax.tree.leaves(args)))

    return wide


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _up(x: Any) -> Any:
    x = jnp.asarray(x) if not hasattr(x, "dtype") else x
    return lax.convert_element_type(x, jnp.float64) if _is_float(x) else x


def _evaluate(closed: Any, args: list[Any]) -> list[Any]:
    # A call may hold a closed jaxpr or, with its constants among its arguments, an open one.
    jaxpr, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
    env: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return _up(atom.val) if isinstance(atom, jex_core.Literal) else env[atom]

    env.update(zip(jaxpr.constvars, map(_up, consts), strict=True))
    env.update(zip(jaxpr.invars, map(_up, args), strict=True))
    for eqn in jaxpr.eqns:
        out = _operation(jaxpr, eqn, [read(atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, map(_up, out), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _operation(jaxpr: Any, eqn: Any, values: list[Any]) -> list[Any]:
    name, params = eqn.primitive.name, eqn.params
    if name in _CALLS:
        inner = next(params[n] for n in ("jaxpr", "call_jaxpr", "fun_jaxpr") if n in params)
        return _evaluate(inner, values)
    if name == "scan":
        return _scan(params, values)
    if name == "while":
        return _while(params, values)
    if name == "cond":
        branches = [lambda *xs, b=branch: _evaluate(b, list(xs)) for branch in params["branches"]]
        platforms = params.get("branches_platforms")
        if platforms and None in platforms:
            # A kernel with a body for some platforms computes what the one for all others does.
            return branches[platforms.index(None)](*values[1:])
        return lax.switch(values[0], branches, *values[1:])
    if name == "reduce_precision":
        return values
    nested = any(
        hasattr(leaf, "eqns")
        for leaf in jax.tree.leaves(params, is_leaf=lambda v: hasattr(v, "eqns"))
    )
    if nested or name in _BY_REPRESENTATION:
        return _as_it_is(jaxpr, eqn, values)
    wide = {
        key: jnp.dtype("float64") if _names_float(key, value) else value
        for key, value in params.items()
    }
    out = eqn.primitive.bind(*values, **wide)
    return list(out) if eqn.primitive.multiple_results else [out]


def _names_float(key: str, value: Any) -> bool:
    named = key in ("new_dtype", "dtype", "preferred_element_type") and value is not None
    return named and jnp.issubdtype(value, jnp.floating)


def _as_it_is(jaxpr: Any, eqn: Any, values: list[Any]) -> list[Any]:
    """Evaluate one operation in the precision that it was traced in."""
    variables = [a for a in eqn.invars if not isinstance(a, jex_core.Literal)]
    own = {
        a: lax.convert_element_type(v, a.aval.dtype) if _is_float(v) else v
        for a, v in zip(eqn.invars, values, strict=True)
        if not isinstance(a, jex_core.Literal)
    }
    alone = jaxpr.replace(
        constvars=[],
        invars=list(dict.fromkeys(variables)),
        outvars=list(eqn.outvars),
        eqns=[eqn],
        effects=eqn.effects,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    run = jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(alone, []))
    return list(run(*(own[v] for v in alone.invars)))


def _scan(params: dict[str, Any], values: list[Any]) -> list[Any]:
    consts = params["num_consts"]
    carried = consts + params["num_carry"]
    fixed, init, xs = values[:consts], values[consts:carried], values[carried:]

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        out = _evaluate(params["jaxpr"], [*fixed, *carry, *x])
        return out[: len(init)], out[len(init) :]

    carry, ys = lax.scan(body, init, xs, params["length"], params["reverse"])
    return [*carry, *ys]


def _while(params: dict[str, Any], values: list[Any]) -> list[Any]:
    first = params["cond_nconsts"]
    second = first + params["body_nconsts"]
    tested, fixed, init = values[:first], values[first:second], values[second:]
    return lax.while_loop(
        lambda carry: _evaluate(params["cond_jaxpr"], [*tested, *carry])[0],
        lambda carry: _evaluate(params["body_jaxpr"], [*fixed, *carry]),
        init,
    )
