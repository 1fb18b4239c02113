"""What was found about one law."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Status = Literal["held", "rounding", "broken", "not applicable"]


class Finding(NamedTuple):
    """The outcome of one law on one loss.

    Attributes:
      law: the law's name, or the path of the parameter whose gradient was checked.
      status: ``"held"``; ``"rounding"`` for a law about bits that holds up to rounding only;
        ``"broken"``; or ``"not applicable"``.
      difference: how far the two sides are apart, relative in norm; ``None`` if nothing was
        measured.
      bound: what the difference may be.
      meaning: what follows in practice, and what to do.
    """

    law: str
    status: Status
    difference: float | None
    bound: float | None
    meaning: str


def bits(tree: PyTree) -> list[bytes]:
    """Return every leaf's bytes."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def distance(left: PyTree, right: PyTree) -> float:
    """Return ``|left - right| / |right|`` of two trees, each taken as one vector.

    >>> distance({"a": jnp.ones(2)}, {"a": jnp.full(2, 2.0)})
    0.5
    """
    x, y = (
        np.concatenate(
            [np.ravel(np.asarray(v, np.float64)) for v in jax.tree.leaves(tree)] or [np.zeros(0)]
        )
        for tree in (left, right)
    )
    if x.shape != y.shape:
        return float("inf")
    gap, size = np.linalg.norm(x - y), np.linalg.norm(y)
    if gap == 0:
        return 0.0
    return float(gap / size) if size > 0 and np.isfinite(gap) else float("inf")


def coarsest(jaxpr: Any) -> float:
    """Return the rounding unit of the least precise float that a jaxpr computes with.

    >>> coarsest(jax.make_jaxpr(lambda x: x.astype(jnp.bfloat16) * 2)(jnp.ones(1))) == 2**-7
    True
    """
    found = [0.0]

    def visit(jaxpr: Any) -> None:
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        for eqn in inner.eqns:
            for variable in eqn.outvars:
                dtype = getattr(variable.aval, "dtype", None)
                if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
                    found.append(float(jnp.finfo(dtype).eps))
            for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns")):
                if hasattr(value, "eqns"):
                    visit(value)

    visit(jaxpr)
    return max(found)
