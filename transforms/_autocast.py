"""Compute chosen operations in a narrow dtype, and delicate ones in a wide one."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex_core

from fnml.core import ConfigError, nearest
from fnml.transforms._layout import Laid
from fnml.transforms._mixed_precision import refuse_gradients
from fnml.transforms._walk import Rules, bodies, trace, walk

PyTree = Any

# Products, whose errors average out and which hardware does fast in few bits, against sums and
# functions that amplify relative errors or leave the range of few bits.
AUTOCAST: Mapping[str, str] = {
    **dict.fromkeys(("dot_general", "conv_general_dilated"), "narrow"),
    **dict.fromkeys(
        (
            *("reduce_sum", "reduce_prod", "cumsum", "cumprod", "cumlogsumexp"),
            *("reduce_window_sum", "exp", "exp2", "expm1", "log", "log1p", "pow", "integer_pow"),
            *("rsqrt", "sqrt", "cbrt", "logistic", "erf", "erf_inv", "lgamma", "digamma"),
            *("sinh", "cosh", "tan", "acosh", "atanh"),
        ),
        "float32",
    ),
}


def autocast(
    function: Callable[..., PyTree],
    dtype: Any = "bfloat16",
    *,
    table: Mapping[str, Any] | None = None,
) -> Callable[..., PyTree]:
    """Compute matrix products and convolutions in ``dtype``, and what is delicate in float32.

    A table says for each primitive in which dtype it is computed: its floating-point inputs are
    cast to it, and its results back to the dtype they had. What has no entry stays as it is. So
    arguments, results and everything between operations keep their shapes and dtypes, and the
    function may be float32 (products get narrow) or bfloat16 (sums and norms get wide). Functions
    with derivatives of their own are rewritten with their derivatives.

    Law: ``autocast(f, dtype)`` is ``f`` with the casts written by hand around each operation of
    the table, bit for bit, and so is its gradient. With an empty result of the table (all
    entries naming the dtype an operation has already) the jaxpr is that of ``f``.

    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.3 (which operations to widen).

    Args:
      function: any function of arrays; a loss before it is differentiated, so that the backward
        products are narrow too.
      dtype: what ``"narrow"`` in the table stands for. For float16, differentiate with
        :func:`scaled_value_and_grad`.
      table: primitive -> dtype, ``"narrow"``, or ``None`` to leave it alone; these entries are
        put over those of ``AUTOCAST``.

    Raises:
      ConfigError: a dtype is no float, or the table names a primitive that JAX does not have.
      LayoutError: ``function`` is a gradient function with a layout.

    >>> import jax, jax.numpy as jnp
    >>> def f(x, w):
    ...     return jnp.exp(x @ w)
    >>> print(jax.make_jaxpr(autocast(f))(jnp.ones((2, 3)), jnp.ones((3, 4))).eqns[2].outvars[0].aval)
    bfloat16[2,4]
    >>> autocast(f)(jnp.ones((2, 3)), jnp.ones((3, 4))).dtype
    dtype('float32')
    """
    dtypes = _table(jnp.dtype(dtype) if _is_float_name(dtype) else dtype, table)
    if isinstance(function, Laid):
        refuse_gradients(function, "autocast")

    def rewrite(eqn: Any, values: list[Any]) -> list[Any] | None:
        to = dtypes.get(eqn.primitive.name)
        return None if to is None or not _changes(eqn, to) else _computed_in(eqn, values, to)

    known: dict[int, bool] = {}

    def inside(closed: Any) -> bool:
        key = id(closed.jaxpr)
        if key not in known:
            known[key] = any(
                _changes(eqn, dtypes.get(eqn.primitive.name)) or wanted((), eqn)
                for eqn in closed.jaxpr.eqns
            )
        return known[key]

    def wanted(_: Any, eqn: Any) -> bool:
        # A derivative of its own may hold products where the function has none.
        return eqn.primitive.name.startswith("custom_") or any(map(inside, bodies(eqn)))

    @functools.wraps(function)
    def cast(*args: Any, **options: Any) -> PyTree:
        known.clear()
        traced = trace(function, args, options)
        out, _ = walk(traced.closed, traced.flat, Rules(rewrite, wanted=wanted))
        return jax.tree.unflatten(traced.tree, out)

    return cast


def _is_float_name(dtype: Any) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False


@functools.cache
def _primitives() -> frozenset[str]:
    found = vars(jex_core.primitives).values()
    return frozenset(p.name for p in found if isinstance(p, jex_core.Primitive))


def _table(dtype: Any, table: Mapping[str, Any] | None) -> dict[str, Any]:
    merged = {**AUTOCAST, **(table or {})}
    faults = [] if _is_float_name(dtype) else [f"dtype={dtype!r}: expected a float dtype"]
    faults += [
        f"table[{name!r}]={to!r}: expected a float dtype, 'narrow' or None"
        for name, to in merged.items()
        if to not in (None, "narrow") and not _is_float_name(to)
    ]
    faults += [
        f"table[{name!r}]: JAX has no such primitive.{nearest(name, _primitives())}"
        for name in table or {}
        if name not in _primitives() and name not in AUTOCAST
    ]
    if faults:
        raise ConfigError("autocast cannot use this table:\n" + "\n".join(faults))
    return {
        name: jnp.dtype(dtype if to == "narrow" else to)
        for name, to in merged.items()
        if to is not None
    }


def _is_float(aval: Any) -> bool:
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.floating)


def _changes(eqn: Any, to: Any) -> bool:
    if to is None:
        return False
    return any(
        _is_float(atom.aval) and atom.aval.dtype != to and _fits(atom.aval.dtype, to)
        for atom in eqn.invars
    )


def _fits(own: Any, to: Any) -> bool:
    """Tell whether a table's dtype applies: float64 was asked for, and stays."""
    return jnp.dtype(own).itemsize <= 4 or jnp.dtype(to).itemsize > 4


def _computed_in(eqn: Any, values: list[Any], to: Any) -> list[Any]:
    narrow = [
        lax.convert_element_type(x, to) if _is_float(atom.aval) else x
        for atom, x in zip(eqn.invars, values, strict=True)
    ]
    params = dict(eqn.params)
    if params.get("preferred_element_type") is not None:
        params["preferred_element_type"] = to
    out = eqn.primitive.bind(*narrow, **eqn.primitive.get_bind_params(params))
    out = out if eqn.primitive.multiple_results else [out]
    return [
        lax.convert_element_type(x, v.aval.dtype) if _is_float(v.aval) else x
        for x, v in zip(out, eqn.outvars, strict=True)
    ]
