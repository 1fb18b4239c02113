"""Evaluate a jaxpr again, changing or observing its equations, however deeply they are nested.

A jaxpr is evaluated equation by equation under whatever transformation is active. An equation
with a body (``jit``, ``scan``, ``while``, ``cond``, ``checkpoint``, functions with their own
derivative, ``shard_map``) is bound again as the same primitive around its rebuilt body, so that
a loop stays a loop and costs what it did.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex_core
from jax.extend import linear_util, source_info_util

PyTree = Any
Site = tuple[int, ...]
Seen = dict[str, jax.Array]

# Where each primitive keeps what it calls. Bodies that are not listed (Pallas kernels, the
# combiner of a scatter) are opaque: their equation is bound as it is.
_BODIES = {
    "jit": ("jaxpr",),
    "pjit": ("jaxpr",),
    "closed_call": ("call_jaxpr",),
    "core_call": ("call_jaxpr",),
    "remat": ("jaxpr",),
    "remat2": ("jaxpr",),
    "checkpoint": ("jaxpr",),
    "custom_jvp_call": ("call_jaxpr",),
    "custom_vjp_call": ("call_jaxpr",),
    "scan": ("jaxpr",),
    "while": ("cond_jaxpr", "body_jaxpr"),
    "cond": ("branches",),
    "shard_map": ("jaxpr",),
}


class Rules(NamedTuple):
    """What a walk does at the equations it meets.

    Attributes:
      rewrite: ``rewrite(eqn, values) -> results``, of the shapes and dtypes that the equation
        has, or ``None`` to leave it.
      observe: ``observe(site, eqn, results) -> {name: array}``, kept and handed to the caller.
        A site is the equation's index, followed by body and index for each nested body.
      wanted: whether to go into an equation's body; what is not wanted is bound as it is.
      rebuilt: bodies that were rewritten already, by identity: what was shared stays shared.
    """

    rewrite: Callable[[Any, list[Any]], list[Any] | None] | None = None
    observe: Callable[[Site, Any, list[Any]], Seen] | None = None
    wanted: Callable[[Site, Any], bool] = lambda site, eqn: True
    rebuilt: dict[int, Any] | None = None


class Traced(NamedTuple):
    """A function as a jaxpr, and how to call it: ``closed`` takes ``flat``, gives ``tree``."""

    closed: Any
    flat: list[Any]
    tree: Any
    shapes: PyTree


def trace(
    function: Callable[..., PyTree], args: tuple[Any, ...], options: dict[str, Any]
) -> Traced:
    """Trace ``function(*args, **options)``; options are no part of the jaxpr's inputs."""
    flat, tree = jax.tree.flatten(args)

    def call(*leaves: Any) -> PyTree:
        return function(*jax.tree.unflatten(tree, leaves), **options)

    closed, shapes = jax.make_jaxpr(call, return_shape=True)(*flat)
    return Traced(closed, flat, jax.tree.structure(shapes), shapes)


def bodies(eqn: Any) -> list[Any]:
    """Return the closed jaxprs that an equation calls; none for a plain operation."""
    found: list[Any] = []
    for name in _BODIES.get(eqn.primitive.name, ()):
        value = eqn.params[name]
        found += value if isinstance(value, tuple | list) else [value]
    return [x if hasattr(x, "consts") else jex_core.ClosedJaxpr(x, ()) for x in found]


def bind(eqn: Any, values: list[Any], **changes: Any) -> list[Any]:
    """Apply an equation's primitive to values, with its parameters or changed ones."""
    params = {**eqn.params, **changes} if changes else eqn.params
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(params))
    return list(out) if eqn.primitive.multiple_results else [out]


def walk(closed: Any, args: list[Any], rules: Rules) -> tuple[list[Any], Seen]:
    """Evaluate a closed jaxpr under rules; return its results, and what was observed.

    What is observed inside a body comes out of it: stacked ``[L, ...]`` from a scan, of the last
    turn from a ``while``, NaN (or zero) from a branch of ``cond`` that was not taken, one row
    per device from ``shard_map``. Through a function with its own derivative no gradient flows
    into what is observed there.

    Law: with rules that change nothing, tracing the walk gives the same jaxpr.
    """
    return _evaluate(closed, args, rules._replace(rebuilt={}), ())


def _evaluate(closed: Any, args: Any, rules: Rules, site: Site) -> tuple[list[Any], Seen]:
    jaxpr, seen = closed.jaxpr, Seen()
    env: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex_core.Literal) else env[atom]

    env.update(zip(jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    outside = source_info_util.current_name_stack()
    for index, eqn in enumerate(jaxpr.eqns):
        values, here = [read(atom) for atom in eqn.invars], (*site, index)
        info = eqn.source_info
        with (
            source_info_util.user_context(info.traceback, name_stack=outside + info.name_stack),
            eqn.ctx.manager,
        ):
            out = None if rules.rewrite is None else rules.rewrite(eqn, values)
            if out is None:
                rebuild = _REBUILD.get(eqn.primitive.name)
                if rebuild is not None and rules.wanted(here, eqn):
                    out, more = rebuild(eqn, values, rules, here)
                    seen.update(more)
                else:
                    out = bind(eqn, values)
            if rules.observe is not None:
                seen.update(rules.observe(here, eqn, out))
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.outvars], seen


def _stage(closed: Any, rules: Rules, site: Site) -> tuple[Any, list[str]]:
    """Rebuild a body; what it observes is appended to its results, in the order of the names."""
    names: list[str] = []
    # What is observed depends on the site, what is rewritten does not.
    shared = {} if rules.observe is not None or rules.rebuilt is None else rules.rebuilt
    if id(closed.jaxpr) in shared:
        return shared[id(closed.jaxpr)], names

    def run(*args: Any) -> list[Any]:
        out, seen = _evaluate(closed, args, rules, site)
        names[:] = list(seen)
        return [*out, *seen.values()]

    staged = jax.make_jaxpr(run)(*closed.in_avals)
    shared[id(closed.jaxpr)] = staged
    return staged, names


def _split(eqn: Any, out: list[Any], names: list[str]) -> tuple[list[Any], Seen]:
    count = len(eqn.outvars)
    return out[:count], dict(zip(names, out[count:], strict=True))


def _opened(closed: Any) -> tuple[Any, list[Any]]:
    """Return a jaxpr without constants, which become its first arguments, and their values."""
    jaxpr, consts = closed.jaxpr, list(closed.consts)
    if not consts:
        return jaxpr, consts
    info = jaxpr.debug_info.with_unknown_names()
    invars = [*jaxpr.constvars, *jaxpr.invars]
    return jaxpr.replace(constvars=[], invars=invars, debug_info=info), consts


def _unspecified() -> Any:
    """Return what stands for a sharding that was left to the compiler."""
    return jax.make_jaxpr(jax.jit(lambda x: x))(0.0).eqns[0].params["out_shardings"][0]


def _jit(eqn: Any, values: list[Any], rules: Rules, site: Site) -> tuple[list[Any], Seen]:
    [body] = bodies(eqn)
    closed, names = _stage(body, rules, (*site, 0))
    changes: dict[str, Any] = {"jaxpr": closed}
    if names:
        more = len(names)
        changes["out_shardings"] = (*eqn.params["out_shardings"], *[_unspecified()] * more)
        changes["out_layouts"] = (*eqn.params["out_layouts"], *[None] * more)
    return _split(eqn, bind(eqn, values, **changes), names)


def _call(eqn: Any, values: list[Any], rules: Rules, site: Site) -> tuple[list[Any], Seen]:
    [body] = bodies(eqn)
    closed, names = _stage(body, rules, (*site, 0))
    return _split(eqn, bind(eqn, values, call_jaxpr=closed), names)


def _checkpoint(eqn: Any, values: list[Any], rules: Rules, site: Site) -> tuple[list[Any], Seen]:
    [body] = bodies(eqn)
    closed, names = _stage(body, rules, (*site, 0))
    jaxpr, consts = _opened(closed)
    return _split(eqn, bind(eqn, [*consts, *values], jaxpr=jaxpr), names)


def _scan(eqn: Any, values: list[Any], rules: Rules, site: Site) -> tuple[list[Any], Seen]:
    [body] = bodies(eqn)
    closed, names = _stage(body, rules, (*site, 0))
    # What is appended to a body's results is one more stacked output of the loop.
    return _split(eqn, bind(eqn, values, jaxpr=closed), names)


def _while(eqn: Any, values: list[Any], rules: Rules, site: Site) -> tuple[list[Any], Seen]:
    test, body = bodies(eqn)
    # A test's own values would have to be carried past the last turn: they are not observed.
    test, _ = _stage(test, rules._replace(observe=None), (*site, 0))
    body, names = _stage(body, rules, (*site, 1))
    if not names:
        return bind(eqn, values, cond_jaxpr=test, body_jaxpr=body), {}
    first = eqn.params["cond_nconsts"]
    second = first + eqn.params["body_nconsts"]
    tested, fixed, init = values[:first], values[first:second], values[second:]
    run_test, run_body = jex_core.jaxpr_as_fun(test), jex_core.jaxpr_as_fun(body)
    slots = [_absent(aval) for aval in body.out_avals[len(init) :]]
    out = lax.while_loop(
        lambda carry: run_test(*tested, *carry[: len(init)])[0],
        lambda carry: run_body(*fixed, *carry[: len(init)]),
        [*init, *slots],
    )
    return _split(eqn, out, names)


def _absent(aval: Any) -> jax.Array:
    """Return what stands for a value that was never computed: NaN, or zero."""
    inexact = jnp.issubdtype(aval.dtype, jnp.inexact)
    return jnp.full(aval.shape, np.nan if inexact else 0, aval.dtype)


def _cond(eqn: Any, values: list[Any], rules: Rules, site: Site) -> tuple[list[Any], Seen]:
    staged = [_stage(b, rules, (*site, i)) for i, b in enumerate(bodies(eqn))]
    count, avals = len(eqn.outvars), dict[str, Any]()
    for closed, names in staged:
        avals.update(zip(names, closed.out_avals[count:], strict=True))
    if not avals:
        return bind(eqn, values, branches=tuple(closed for closed, _ in staged)), {}

    def filled(closed: Any, names: list[str]) -> Any:
        def run(*args: Any) -> list[Any]:
            out = jex_core.jaxpr_as_fun(closed)(*args)
            own = dict(zip(names, out[count:], strict=True))
            return [
                *out[:count],
                *[own.get(name, _absent(aval)) for name, aval in avals.items()],
            ]

        return jax.make_jaxpr(run)(*closed.in_avals)

    branches = tuple(filled(closed, names) for closed, names in staged)
    return _split(eqn, bind(eqn, values, branches=branches), list(avals))


def _custom(eqn: Any, values: list[Any], rules: Rules, site: Site) -> tuple[list[Any], Seen]:
    """Rebuild a function with its own derivative: the rule is rewritten as the function is."""
    if rules.rewrite is None:
        out = bind(eqn, values)
    else:
        blind = rules._replace(observe=None)
        params = eqn.primitive.get_bind_params(eqn.params)
        params["subfuns"] = tuple(_rewritten(f, blind, site) for f in params["subfuns"])
        out = list(eqn.primitive.bind(*values, **params))
    if rules.observe is None:
        return out, {}
    # The function's own derivative knows only its own results: what is observed is computed
    # beside it, and the compiler finds that the two are the same.
    [body] = bodies(eqn)
    _, seen = _evaluate(body, [lax.stop_gradient(x) for x in values], rules, (*site, 0))
    return out, seen


def _rewritten(wrapped: Any, rules: Rules, site: Site) -> Any:
    """Wrap a function so that what it computes is rewritten; what is no array passes through."""

    def is_array(x: Any) -> bool:
        return isinstance(x, jax.Array | np.ndarray | np.generic)

    def call(*args: Any) -> list[Any]:
        where = [i for i, x in enumerate(args) if is_array(x)]
        others: list[Any] = []

        def run(*arrays: Any) -> list[Any]:
            full = list(args)
            for i, x in zip(where, arrays, strict=True):
                full[i] = x
            out = wrapped.call_wrapped(*full)
            others[:] = [None if is_array(x) else x for x in out]
            kept[:] = [is_array(x) for x in out]
            return [x for x in out if is_array(x)]

        kept: list[bool] = []
        arrays = [args[i] for i in where]
        out, _ = _evaluate(jax.make_jaxpr(run)(*arrays), arrays, rules, (*site, 0))
        results = iter(out)
        return [next(results) if own else x for own, x in zip(kept, others, strict=True)]

    return linear_util.wrap_init(call, debug_info=wrapped.debug_info)


def _shard_map(eqn: Any, values: list[Any], rules: Rules, site: Site) -> tuple[list[Any], Seen]:
    [body] = bodies(eqn)
    params = eqn.params
    manual = params["newly_manual_axes"]
    out_specs = list(params["out_specs"])
    names: list[str] = []

    def run(*args: Any) -> list[Any]:
        out, seen = _evaluate(body, args, rules, (*site, 0))
        names[:] = list(seen)
        return [*out, *[x[None] for x in seen.values()]]

    # What each device sees becomes a row of its own; how many there are is known once traced.
    if rules.observe is not None:
        mapped = _mapped(params, lambda *args: run(*args)[: len(out_specs)], out_specs)
        jax.eval_shape(mapped, *values)
    rows = [jax.P(tuple(a for a in params["mesh"].axis_names if a in manual))] * len(names)
    return _split(eqn, list(_mapped(params, run, [*out_specs, *rows])(*values)), names)


def _mapped(params: dict[str, Any], function: Any, out_specs: list[Any]) -> Any:
    return jax.shard_map(
        function,
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=out_specs,
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )


_REBUILD = {
    "jit": _jit,
    "pjit": _jit,
    "closed_call": _call,
    "core_call": _call,
    "remat": _checkpoint,
    "remat2": _checkpoint,
    "checkpoint": _checkpoint,
    "custom_jvp_call": _custom,
    "custom_vjp_call": _custom,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
