"""Stop at the first result that is not finite, and say where it came from."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnml.core import NonFiniteError, leaf_names
from fnml.transforms._layout import Laid, Whole
from fnml.transforms._nonfinite import find_nonfinite
from fnml.transforms._reproduce import save_arguments

PyTree = Any

_WHY = (
    "checked tests the results of a whole batch, so it comes after the layout: "
    "checked(accumulate(grad_fn, n)); or inside it, accumulate(checked(grad_fn), n)"
)


def checked(
    function: Callable[..., PyTree],
    *,
    on: bool = True,
    params_argnum: int = 0,
    batch_argnum: int | None = 1,
    directory: Path | str | None = None,
) -> Callable[..., PyTree]:
    """Return ``function`` with its results tested: NaN and infinities raise, with their origin.

    Called from outside (``checked(jax.jit(f))``) the error is :func:`find_nonfinite`'s report:
    operation, source line, layer, parameters, batch examples. Called while something else is
    traced (``jax.jit(checked(f))``) a callback runs only where a result is not finite; it names
    the results and writes the arguments to ``directory``, from which :func:`load_arguments` and
    :func:`find_nonfinite` go on. The error then is JAX's, with this text in it.

    Law: ``checked(f)(*args)`` has the bits of ``f(*args)`` where those are finite, since ``f``
    itself is run; ``checked(f, on=False)`` is ``f``.

    Args:
      function: any function of arrays.
      on: whether to test at all.
      params_argnum: which argument holds the parameters that are named.
      batch_argnum: which argument holds the batch whose examples are tried.
      directory: where to write the arguments of a failing call, and the report.

    Raises:
      NonFiniteError: a result is not finite.
      LayoutError: a layout is put around ``checked(layout)`` (when called).

    >>> checked(jnp.log)(jnp.float32(1.0)).tolist()
    0.0
    >>> try:
    ...     checked(jnp.log)(jnp.float32(-1.0))
    ... except NonFiniteError as error:
    ...     print(str(error).split(",")[0])
    log made the first NaN
    """
    if not on:
        return function

    @functools.wraps(function)
    def tested(*args: Any, **options: Any) -> PyTree:
        out = function(*args, **options)
        floats = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.inexact)]
        bad = [~jnp.all(jnp.isfinite(x)) for x in floats]
        if not bad:
            return out
        if any(isinstance(x, jax.core.Tracer) for x in bad):
            _watch(function, args, out, jnp.stack(bad), directory)
        elif any(map(bool, bad)):
            found = find_nonfinite(
                function,
                *args,
                params_argnum=params_argnum,
                batch_argnum=batch_argnum,
                directory=directory,
                **options,
            )
            raise NonFiniteError(str(found) if found else _names(out, np.asarray(bad)))
        return out

    # A layout around a layout must see its shards, which a test of the results hides.
    if isinstance(function, Laid | Whole):
        return Whole(tested, "checked", getattr(function, "why", _WHY))
    return tested


def _names(out: PyTree, bad: np.ndarray) -> str:
    names = [
        name or "the result"
        for name, x in zip(leaf_names(out), jax.tree.leaves(out), strict=True)
        if jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    wrong = [name for name, one in zip(names, bad, strict=True) if one]
    return f"not finite: {', '.join(wrong[:6])}{', ...' if len(wrong) > 6 else ''}"


def _watch(
    function: Any, args: tuple[Any, ...], out: PyTree, bad: jax.Array, directory: Any
) -> None:
    """Arrange for a callback where a result is not finite; no operation of the function changes."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), out)
    name = getattr(function, "__name__", "the function")
    flat, tree = jax.tree.flatten(args)
    impls = [
        jax.random.key_impl(x) if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key) else None
        for x in flat
    ]
    sent = [
        x if impl is None else jax.random.key_data(x) for x, impl in zip(flat, impls, strict=True)
    ]

    def tell(bad: np.ndarray, *leaves: Any) -> None:
        if not np.any(bad):
            return
        text = f"{name}: {_names(shapes, np.asarray(bad))}"
        if directory is not None:
            whole = [
                x if impl is None else jax.random.wrap_key_data(x, impl=impl)
                for x, impl in zip(leaves, impls, strict=True)
            ]
            save_arguments(directory, jax.tree.unflatten(tree, whole), report=text)
            text += (
                f"; its arguments are in {directory}: find_nonfinite({name}, *load_arguments(...))"
            )
        raise NonFiniteError(text)

    shown = () if directory is None else tuple(lax.stop_gradient(x) for x in sent)
    lax.cond(
        jnp.any(bad),
        lambda bad, *xs: jax.debug.callback(tell, bad, *xs),
        lambda bad, *xs: None,
        bad,
        *shown,
    )
