"""Turn a guest's whole initialisation into one initializer per array."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from fnml.core import Initializer

PyTree = Any


def drawers(initialise: Callable[[jax.Array], PyTree], count: int) -> list[Initializer]:
    """Return an initializer for each of the ``count`` leaves of ``initialise(key)``.

    ``initialise`` is traced once, when the first of them is called; each then runs only the
    operations that its own leaf depends on.

    Law: ``drawers(f)[i](key, ...) == jax.tree.leaves(f(key))[i]``.

    >>> def both(key):
    ...     return jnp.zeros(2), jax.random.normal(key, (3,))
    >>> _, normal = drawers(both, 2)
    >>> normal(jax.random.key(0), (3,), jnp.float32).shape
    (3,)
    """

    @functools.cache
    def trace() -> Any:
        key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
        return jax.make_jaxpr(lambda key: jax.tree.leaves(initialise(key)))(key)

    def drawer(index: int) -> Initializer:
        def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            [leaf] = jex_core.jaxpr_as_fun(_only(trace(), index))(key)
            return jnp.asarray(leaf, dtype).reshape(shape)

        return draw

    return [drawer(i) for i in range(count)]


def _only(closed: Any, index: int) -> Any:
    """Return the jaxpr with one output, without the operations that it does not need."""
    jaxpr = closed.jaxpr
    needed: set[Any] = set()
    kept: list[Any] = []

    def need(atoms: Any) -> None:
        needed.update(atom for atom in atoms if not isinstance(atom, jex_core.Literal))

    need([jaxpr.outvars[index]])
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            kept.append(eqn)
            need(eqn.invars)
    alone = jaxpr.replace(
        eqns=kept[::-1],
        outvars=[jaxpr.outvars[index]],
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    return jex_core.ClosedJaxpr(alone, closed.consts)
