"""Follow what depends on what through a jaxpr and all its bodies."""

from collections.abc import Callable
from typing import Any

from jax.extend import core as jex_core

from fnml.transforms._walk import bodies

Labels = frozenset[Any]
Visit = Callable[[Any, Any, list[Labels]], None]
_NONE: Labels = frozenset()


def flow(closed: Any, given: list[Labels], visit: Visit | None = None) -> list[Labels]:
    """Return, for each result, the union of the labels of the inputs that it depends on.

    Args:
      closed: a closed jaxpr.
      given: the labels of each input.
      visit: called as ``visit(jaxpr, eqn, labels of each input)`` at every plain equation.

    >>> import jax
    >>> closed = jax.make_jaxpr(lambda x, y: (x + 1, x * y))(1.0, 2.0)
    >>> [sorted(labels) for labels in flow(closed, [frozenset("x"), frozenset("y")])]
    [['x'], ['x', 'y']]
    """
    jaxpr = closed.jaxpr
    env: dict[Any, Labels] = dict(zip(jaxpr.invars, given, strict=True))

    def read(atom: Any) -> Labels:
        return _NONE if isinstance(atom, jex_core.Literal) else env.get(atom, _NONE)

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        inner = bodies(eqn)
        if not inner:
            if visit is not None:
                visit(jaxpr, eqn, values)
            results = [_NONE.union(*values)] * len(eqn.outvars)
        else:
            results = _inside(eqn, inner, values, visit)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _inside(eqn: Any, inner: list[Any], values: list[Labels], visit: Visit | None) -> list[Labels]:
    name, params = eqn.primitive.name, eqn.params
    if name == "cond":
        branches = [flow(body, values[1:], visit) for body in inner]
        return [values[0].union(*sides) for sides in zip(*branches, strict=True)]
    if name == "scan":
        first, count = params["num_consts"], params["num_carry"]
        fixed, carry, xs = values[:first], values[first : first + count], values[first + count :]
        carry = _settled(lambda c: flow(inner[0], [*fixed, *c, *xs])[:count], carry)
        return flow(inner[0], [*fixed, *carry, *xs], visit)
    if name == "while":
        first = params["cond_nconsts"]
        second = first + params["body_nconsts"]
        tested, fixed, carry = values[:first], values[first:second], values[second:]

        def turn(c: list[Labels]) -> list[Labels]:
            [stop] = flow(inner[0], [*tested, *c])
            return [x | stop for x in flow(inner[1], [*fixed, *c])]

        carry = _settled(turn, carry)
        flow(inner[0], [*tested, *carry], visit)
        flow(inner[1], [*fixed, *carry], visit)
        return carry
    return flow(inner[0], values, visit)


def _settled(turn: Callable[[list[Labels]], list[Labels]], carry: list[Labels]) -> list[Labels]:
    """Repeat a loop's turn until no label travels any further."""
    while True:
        more = [a | b for a, b in zip(carry, turn(carry), strict=True)]
        if more == carry:
            return carry
        carry = more
