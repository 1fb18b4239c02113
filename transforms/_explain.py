"""Say why a compiled function was traced again, and which of its arguments were given away."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fnml.core import ConfigError, path_name

PyTree = Any


class Change(NamedTuple):
    """One thing that differs between two calls, or is wrong with the second.

    Attributes:
      path: the argument, by parameter name and path.
      what: ``"shape"``, ``"dtype"``, ``"weak type"``, ``"sharding"``, ``"static"``, ``"tree"``,
        ``"donated"`` (read again after it was given away) or ``"function"``.
      before, after: what it was.
      cure: what to do about it.
      recompiles: whether it makes JAX compile again.
    """

    path: str
    what: str
    before: str
    after: str
    cure: str
    recompiles: bool = True

    def __str__(self) -> str:
        return f"{self.path}: {self.what} {self.before} -> {self.after}: {self.cure}"


_CURES = {
    "shape": "pad to one shape, or drop the last short batch",
    "dtype": "cast it before the call",
    "weak type": "a Python number became an array, or the other way round: wrap it in jnp.asarray "
    "with a dtype",
    "sharding": "place it with jax.device_put(x, sharding) before the first call",
    "static": "a static argument compiles once per value: pass what varies as an array",
    "tree": "give the arguments one structure in every call",
}


def explain(
    function: Callable[..., Any],
    before: tuple[Any, ...],
    after: tuple[Any, ...],
    *,
    options_before: dict[str, Any] | None = None,
    options_after: dict[str, Any] | None = None,
    static_argnames: Sequence[str] = (),
) -> list[Change]:
    """List what makes ``function(*after)`` compile again after ``function(*before)``.

    Nothing is run. Donated arrays have lost their values, but not their shapes, so the arguments
    of a call that donated them can be given as ``before``.

    Args:
      function: a function compiled by ``jax.jit``; its signature names the arguments.
      before: the positional arguments of a call that is compiled already.
      after: those of the call that compiled again, or failed on a deleted array.
      options_before: the keywords of the first call.
      options_after: those of the second.
      static_argnames: the arguments that are static.

    Returns:
      A change for each leaf and each static argument that differs, and for each array of
      ``after`` that an earlier call was given to keep; ``[]`` if the calls share a program.

    Raises:
      ConfigError: a call does not fit the function's signature.

    >>> import jax.numpy as jnp
    >>> step = jax.jit(lambda params, batch: params)
    >>> for change in explain(step, (1.0, jnp.ones((8, 2))), (1.0, jnp.ones((5, 2)))):
    ...     print(change)
    batch: shape (8, 2) -> (5, 2): pad to one shape, or drop the last short batch
    """
    left = _bound(function, before, options_before or {})
    right = _bound(function, after, options_after or {})
    found = []
    for name in dict.fromkeys((*left, *right)):
        if name not in left or name not in right:
            one, other = ("given" if name in side else "not given" for side in (left, right))
            found.append(Change(name, "tree", one, other, _CURES["tree"]))
        elif name in static_argnames:
            if left[name] != right[name] or type(left[name]) is not type(right[name]):
                one, other = (repr(side[name]) for side in (left, right))
                found.append(Change(name, "static", one, other, _CURES["static"]))
        else:
            found += _leaves(name, left[name], right[name])
    return found


def _bound(function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    try:
        return dict(inspect.signature(function).bind(*args, **options).arguments)
    except TypeError as error:
        raise ConfigError(f"these arguments do not fit {function}: {error}") from error


def _leaves(name: str, left: PyTree, right: PyTree) -> list[Change]:
    one, other = (
        {"/".join(filter(None, (name, path_name(p)))): x for p, x in jax.tree.leaves_with_path(t)}
        for t in (left, right)
    )
    found = []
    for path in dict.fromkeys((*one, *other)):
        if path not in one or path not in other:
            was, now = ("there" if path in side else "missing" for side in (one, other))
            found.append(Change(path, "tree", was, now, _CURES["tree"]))
            continue
        found += _leaf(path, one[path], other[path])
    was, now = (str(jax.tree.structure(t)) for t in (left, right))
    if not found and was != now:
        found.append(Change(name, "tree", was, now, _CURES["tree"]))
    return found


def _leaf(path: str, left: Any, right: Any) -> list[Change]:
    one, other = _signature(left), _signature(right)
    found = [
        Change(path, what, str(one[what]), str(other[what]), _CURES[what])
        for what in one
        if one[what] != other[what]
    ]
    if isinstance(right, jax.Array) and right.is_deleted():
        cure = "an earlier call was given it to keep (donate_argnums): use that call's result"
        found.append(Change(path, "donated", "alive", "deleted", cure, recompiles=False))
    return found


def _signature(x: Any) -> dict[str, Any]:
    """Return what JAX keys a compiled program on."""
    if isinstance(x, bool | int | float | complex):
        own = jax.dtypes.canonicalize_dtype(np.result_type(x))
        return {"shape": (), "dtype": own, "weak type": not isinstance(x, bool), "sharding": None}
    sharding = getattr(x, "sharding", None)
    # An array that was never placed goes where the computation goes.
    placed = sharding if isinstance(x, jax.Array) and getattr(x, "committed", False) else None
    dtype: Any = getattr(x, "dtype", None)
    if isinstance(x, np.ndarray | np.generic):
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    return {
        "shape": tuple(np.shape(x)),
        "dtype": dtype if dtype is not None else type(x).__name__,
        "weak type": bool(getattr(x, "weak_type", False)),
        "sharding": placed,
    }
