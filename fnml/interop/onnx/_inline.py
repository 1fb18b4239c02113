"""Write a jaxpr into a graph, equation by equation."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from fnml.interop.onnx._builder import Builder, Refused, physical
from fnml.transforms._sites import scopes, source
from fnml.transforms._walk import bodies


def inline(g: Builder, closed: Any, inputs: Sequence[str], *, own: bool = True) -> list[str]:
    """Add the nodes of a closed jaxpr, and return the names of its results.

    What cannot be exported is noted in ``g.refusals``; the other equations are still tried.

    Args:
      g: the builder.
      closed: the jaxpr.
      inputs: the names of its inputs.
      own: whether its equations come from lines of the user's.
    """
    before = g.place
    g.place = before if own else before._replace(fixed=True)
    try:
        return _equations(g, closed, inputs)
    finally:
        g.place = before


def _equations(g: Builder, closed: Any, inputs: Sequence[str]) -> list[str]:
    jaxpr = closed.jaxpr
    env: dict[Any, str] = dict(zip(jaxpr.invars, inputs, strict=True))
    for variable, value in zip(jaxpr.constvars, closed.consts, strict=True):
        env[variable] = g.constant(host(value))

    def read(atom: Any) -> str:
        if isinstance(atom, jex_core.Literal):
            return g.constant(atom.val, physical(atom.aval)[1])
        return env[atom]

    for variable in (*jaxpr.invars, *jaxpr.constvars):
        _shaped(g, env[variable], variable)
    for eqn in _used(jaxpr):
        env.update(zip(eqn.outvars, _write(g, eqn, list(map(read, eqn.invars))), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def host(value: Any) -> np.ndarray:
    """Return an array on the host, keys as their data."""
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    return np.asarray(value)


def _used(jaxpr: Any) -> list[Any]:
    """Return the equations that a result depends on: no effect can leave a file."""
    needed = {atom for atom in jaxpr.outvars if not isinstance(atom, jex_core.Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if any(variable in needed for variable in eqn.outvars):
            kept.append(eqn)
            needed |= {atom for atom in eqn.invars if not isinstance(atom, jex_core.Literal)}
    return kept[::-1]


def _write(g: Builder, eqn: Any, inputs: Sequence[str]) -> list[str]:
    before, name = g.place, eqn.primitive.name
    origins = before.origins if before.fixed else (*before.origins, eqn)
    scope = "".join(f"{part}/" for part in scopes(eqn)) or before.scope
    try:
        shape = physical(eqn.outvars[0].aval)[0]
        g.place = before._replace(scope=scope, shape=shape, origins=origins)
        lowering = g.lowerings.get(name)
        if lowering is None:
            raise Refused("there is no way to write it in ONNX")
        if _moves_keys(eqn):
            out = inline(g, _on_key_data(eqn), inputs, own=False)
        else:
            out = lowering(g, eqn, *inputs)
        outputs = [out] if isinstance(out, str) else list(out)
        for output, variable in zip(outputs, eqn.outvars, strict=True):
            _shaped(g, output, variable)
        return outputs
    except Refused as refusal:
        g.refusals.append(f"{name}, at {_line(origins)}: {refusal}")
        return [g.declare(g.name("refused"), _kept_as(v.aval)) for v in eqn.outvars]
    finally:
        g.place = before


def _line(origins: Sequence[Any]) -> str:
    """Return the user's line of the innermost equation that has one."""
    return next(filter(None, map(source, reversed(origins))), "an unknown line")


def _shaped(g: Builder, name: str, variable: Any) -> None:
    if name not in g.shapes and hasattr(variable.aval, "shape"):
        g.shapes[name] = physical(variable.aval)[0]


def _kept_as(aval: Any) -> Any:
    try:
        return physical(aval)[1]
    except Refused:
        return np.float32


def _is_key(aval: Any) -> bool:
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)


def _moves_keys(eqn: Any) -> bool:
    """Tell whether an equation rearranges keys as it would any other array."""
    if eqn.primitive.name.startswith("random_") or bodies(eqn):
        return False
    return any(_is_key(atom.aval) for atom in (*eqn.invars, *eqn.outvars))


def _on_key_data(eqn: Any) -> Any:
    """Return an equation on keys as the same one on each word of their data."""
    axes = tuple(-1 if _is_key(atom.aval) else None for atom in eqn.invars)
    avals = [jax.ShapeDtypeStruct(*physical(atom.aval)) for atom in eqn.invars]

    def run(*values: Any) -> Any:
        return eqn.primitive.bind(*values, **eqn.params)

    return jax.make_jaxpr(jax.vmap(run, in_axes=axes, out_axes=-1))(*avals)
