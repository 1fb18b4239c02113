"""Find the first operation that made a result NaN or infinite."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from fnml.core import leaf_names
from fnml.transforms._reproduce import save_arguments
from fnml.transforms._sites import scopes, source
from fnml.transforms._walk import Rules, Traced, bodies, trace, walk

PyTree = Any
Reach = dict[str, int]
_NEAREST = 8

_CONSTANT = "a constant"


@dataclass(frozen=True)
class NonFinite:
    """Where a result stopped being finite.

    Attributes:
      kind: ``"NaN"`` or ``"infinity"``, as made by the operation.
      primitive: the operation, such as ``"log"``; ``"argument"`` if it came in with one.
      source: the line of the user's code: ``file:line (function)``; the path of an argument.
      scope: the named scopes around it, joined with ``/``.
      loops: the index of each loop's turn around it, outermost first: the layer, in a scan
        over layers.
      index: the first element of its result that is not finite.
      inputs: its inputs, each as ``dtype[shape] in [min, max]``.
      parameters: paths of the parameters that are nearest to it.
      examples: batch examples that give it on their own; empty if all do, or if unknown.
      then: where an infinity first became NaN, if it did.
      directory: where the arguments were written.
    """

    kind: str
    primitive: str
    source: str
    scope: str = ""
    loops: tuple[int, ...] = ()
    index: tuple[int, ...] = ()
    inputs: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    examples: tuple[int, ...] = ()
    then: str = ""
    directory: str = ""

    def __str__(self) -> str:
        if self.primitive == "argument":
            lines = [f"{self.source} holds {self.kind} at {list(self.index)} on entry"]
        else:
            lines = [f"{self.primitive} made the first {self.kind}, at {self.source}"]
        if self.scope:
            lines.append(f"  in the scope {self.scope}")
        if self.loops:
            lines.append(f"  in turn {', '.join(map(str, self.loops))} of its loop (layer)")
        if self.inputs:
            lines.append(f"  element {list(self.index)} of its result, from")
            lines += [f"    {text}" for text in self.inputs]
        if self.parameters:
            lines.append(f"  nearest parameters: {', '.join(self.parameters)}")
        if self.examples:
            lines.append(f"  batch examples: {', '.join(map(str, self.examples[:8]))}")
        if self.then:
            lines.append(f"  NaN first in {self.then}")
        if self.directory:
            lines.append(f"  to reproduce: fnml.transforms.load_arguments({self.directory!r})")
        return "\n".join(lines)


def find_nonfinite(
    function: Callable[..., PyTree],
    *args: Any,
    params_argnum: int = 0,
    batch_argnum: int | None = 1,
    directory: Path | str | None = None,
    **options: Any,
) -> NonFinite | None:
    """Return the first operation that made a NaN or an infinity in the results, else ``None``.

    The function is evaluated level by level: from a result that is not finite back to the
    operation that made it so from finite inputs, then into that operation's body, and there into
    the first turn of a loop that went wrong. Infinities that never reach a result (the ``-inf``
    of a mask) are no fault. It works on gradients too, and finds the line of the forward pass
    that a backward operation comes from.

    Args:
      function: any function of arrays, such as ``jax.value_and_grad(loss_fn, has_aux=True)``.
      *args: its arguments.
      params_argnum: which argument holds the parameters that are named.
      batch_argnum: which argument holds the batch; its examples are then tried one by one,
        up to 256 of them.
      directory: where to write the arguments and this report, if something is found.
      **options: keywords of the function.

    >>> def f(x):
    ...     return jnp.sum(jnp.log(x - 1))
    >>> found = find_nonfinite(f, jnp.array([3.0, 0.5]))
    >>> found.kind, found.primitive, found.index, found.inputs
    ('NaN', 'log', (1,), ('float32[2] in [-0.5, 2]',))
    """
    traced = trace(function, args, options)
    run = jax.jit(jex_core.jaxpr_as_fun(traced.closed))
    if not any(_is_bad(x) for x in run(*traced.flat)):
        return None
    paths = leaf_names(args)
    found = _argument(args, paths)
    if found is None:
        own = leaf_names(args[params_argnum]) if params_argnum < len(args) else []
        head = f"{params_argnum}/" if own != [""] else str(params_argnum)
        reach: list[Reach] = [
            {path.removeprefix(head) or "params": 0} if path.startswith(head) else {}
            for path in paths
        ]
        found = _level(traced.closed, traced.flat, reach, ())
        examples = _examples(run, traced, args, batch_argnum)
        found = replace(found, examples=examples)
    if directory is not None:
        found = replace(found, directory=str(directory))
        save_arguments(directory, args, report=str(found), found=asdict(found))
    return found


def _is_float(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


def _is_bad(x: Any) -> bool:
    return _is_float(x) and not bool(jnp.all(jnp.isfinite(x)))


def _flags(x: Any) -> tuple[bool, bool]:
    """Return whether a value holds a NaN, and an infinity."""
    if not _is_float(x):
        return (False, False)
    x = np.asarray(x).astype(np.complex64 if np.iscomplexobj(x) else np.float32)
    return bool(np.isnan(x).any()), bool(np.isinf(x).any())


def _argument(args: tuple[Any, ...], paths: list[str]) -> NonFinite | None:
    for path, x in zip(paths, jax.tree.leaves(args), strict=True):
        nan, infinite = _flags(x)
        if nan or infinite:
            return NonFinite(
                "NaN" if nan else "infinity", "argument", path, index=_first_bad(np.asarray(x), nan)
            )
    return None


def _first_bad(x: np.ndarray, nan: bool) -> tuple[int, ...]:
    x = x.astype(np.float32) if x.dtype.kind != "c" else x
    where = np.argwhere(np.isnan(x) if nan else np.isinf(x))
    return tuple(int(i) for i in where[0]) if len(where) else ()


def _level(closed: Any, values: list[Any], reach: list[Reach], loops: tuple[int, ...]) -> NonFinite:
    """Find the origin among a jaxpr's equations, given inputs that make a result non-finite."""
    jaxpr = closed.jaxpr
    state: dict[Any, tuple[bool, bool]] = {}
    made: dict[Any, tuple[int, int]] = {}
    near: dict[Any, Reach] = {}
    given = [*zip(jaxpr.constvars, closed.consts, strict=True)]
    given += zip(jaxpr.invars, values, strict=True)
    for variable, value in given:
        state[variable] = _flags(value)
    near.update(zip(jaxpr.invars, reach, strict=True))
    for i, eqn in enumerate(jaxpr.eqns):
        merged: Reach = {}
        for atom in eqn.invars:
            for path, d in _near(near, atom).items():
                merged[path] = min(merged.get(path, d + 1), d + 1)
        kept = dict(sorted(merged.items(), key=lambda item: item[1])[:_NEAREST])
        for k, v in enumerate(eqn.outvars):
            made[v], near[v] = (i, k), kept

    def flags(site: Any, eqn: Any, results: list[Any]) -> dict[str, Any]:
        return {
            f"{site[0]}/{k}": jnp.stack([jnp.any(jnp.isnan(x)), jnp.any(jnp.isinf(x))])
            for k, x in enumerate(results)
            if _is_float(x)
        }

    rules = Rules(observe=flags, wanted=lambda site, eqn: False)
    seen = jax.jit(lambda *xs: walk(closed, list(xs), rules)[1])(*values)
    for v, (i, k) in made.items():
        nan, infinite = seen.get(f"{i}/{k}", (False, False))
        state[v] = bool(nan), bool(infinite)

    def bad(atom: Any, nan: bool) -> bool:
        own = (
            _flags(np.asarray(atom.val))
            if isinstance(atom, jex_core.Literal)
            else state.get(atom, (False, False))
        )
        return own[0 if nan else 1]

    def origin(v: Any, nan: bool) -> tuple[int, int] | None:
        """Follow a NaN, or an infinity, back to the equation that made it."""
        while v in made:
            i, k = made[v]
            before = next((a for a in jaxpr.eqns[i].invars if bad(a, nan)), None)
            if before is None:
                return i, k
            if isinstance(before, jex_core.Literal):
                return None
            v = before
        return None

    outputs = [v for v in jaxpr.outvars if not isinstance(v, jex_core.Literal)]
    target = next((v for v in outputs if bad(v, True)), None)
    nan = target is not None
    if target is None:
        target = next((v for v in outputs if bad(v, False)), None)
    place = None if target is None else origin(target, nan)
    if place is None:
        return NonFinite("NaN" if nan else "infinity", "argument", _CONSTANT, loops=loops)
    if nan:
        eqn = jaxpr.eqns[place[0]]
        infinite = [a for a in eqn.invars if not isinstance(a, jex_core.Literal) and bad(a, False)]
        for first in (x for x in (origin(a, False) for a in infinite) if x is not None):
            found = _origin(closed, values, first, False, near, loops)
            # The -inf of a mask, which a branch or a loop hands on, is no origin.
            if found.source != _CONSTANT:
                then = f"{eqn.primitive.name} at {source(eqn)}"
                return found if found.then else replace(found, then=then)
    return _origin(closed, values, place, nan, near, loops)


def _near(near: dict[Any, Reach], atom: Any) -> Reach:
    return {} if isinstance(atom, jex_core.Literal) else near.get(atom, {})


def _origin(
    closed: Any,
    values: list[Any],
    place: tuple[int, int],
    nan: bool,
    near: dict[Any, Reach],
    loops: tuple[int, ...],
) -> NonFinite:
    """Describe an equation, or go into its body."""
    i, k = place
    eqn = closed.jaxpr.eqns[i]
    env = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(closed.jaxpr.invars, values, strict=True))
    wanted = {a for a in eqn.invars if not isinstance(a, jex_core.Literal) and a not in env}
    wanted.add(eqn.outvars[k])
    keys = {
        f"{j}/{m}": v
        for j, other in enumerate(closed.jaxpr.eqns[: i + 1])
        for m, v in enumerate(other.outvars)
        if v in wanted
    }

    def some(site: Any, other: Any, results: list[Any]) -> dict[str, Any]:
        own = ((f"{site[0]}/{m}", x) for m, x in enumerate(results))
        return {name: x for name, x in own if name in keys}

    rules = Rules(observe=some, wanted=lambda site, other: False)
    seen = jax.jit(lambda *xs: walk(closed, list(xs), rules)[1])(*values)
    env.update({keys[name]: x for name, x in seen.items()})
    inputs = [a.val if isinstance(a, jex_core.Literal) else env[a] for a in eqn.invars]
    reach = [_near(near, a) for a in eqn.invars]
    inside = _inside(eqn, inputs, reach, nan, loops)
    if inside is not None:
        return inside
    result = np.asarray(env[eqn.outvars[k]])
    nearest = sorted({p: d for r in reach for p, d in r.items()}.items(), key=lambda x: x[1])
    close = [p for p, d in nearest if d == nearest[0][1]]
    return NonFinite(
        "NaN" if nan else "infinity",
        eqn.primitive.name,
        source(eqn),
        scope="/".join(scopes(eqn)),
        loops=loops,
        index=_first_bad(result, nan),
        inputs=tuple(_summary(x) for x in inputs),
        parameters=tuple(close[:3]),
    )


def _summary(x: Any) -> str:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return f"key{list(x.shape)}"
    x = np.asarray(x)
    text = f"{x.dtype.name}[{','.join(map(str, x.shape))}]"
    if x.size == 0 or x.dtype.kind in "bc":
        return text
    wide = x.astype(np.float64)
    return f"{text} in [{np.min(wide):.4g}, {np.max(wide):.4g}]"


def _inside(
    eqn: Any, inputs: list[Any], reach: list[Reach], nan: bool, loops: tuple[int, ...]
) -> NonFinite | None:
    """Go into the body of an equation; ``None`` if it has none that shows the fault."""
    name, inner = eqn.primitive.name, bodies(eqn)
    if not inner or name == "shard_map":
        return None
    if name == "cond":
        branch = int(np.clip(np.asarray(inputs[0]), 0, len(inner) - 1))
        return _level(inner[branch], inputs[1:], reach[1:], loops)
    if name == "scan":
        return _in_scan(eqn, inner[0], inputs, reach, nan, loops)
    if name == "while":
        return _in_while(eqn, inner, inputs, reach, nan, loops)
    if any(a.dtype != v.aval.dtype for a, v in zip(inputs, inner[0].jaxpr.invars, strict=True)):
        return None
    results = jax.jit(jex_core.jaxpr_as_fun(inner[0]))(*inputs)
    return _level(inner[0], inputs, reach, loops) if any(_is_bad(x) for x in results) else None


def _in_scan(
    eqn: Any, body: Any, inputs: list[Any], reach: list[Reach], nan: bool, loops: tuple[int, ...]
) -> NonFinite | None:
    params = eqn.params
    first, count = params["num_consts"], params["num_carry"]
    fixed, carry = inputs[:first], list(inputs[first : first + count])
    run = jax.jit(jex_core.jaxpr_as_fun(body))
    turns = range(params["length"])
    overflow = None
    for turn in reversed(turns) if params["reverse"] else turns:
        values = [*fixed, *carry, *(x[turn] for x in inputs[first + count :])]
        out = run(*values)
        if any(_flags(x)[0 if nan else 1] for x in out):
            # An infinity that an earlier turn carried over is what made this one's NaN.
            turn, values = overflow or (turn, values)
            return _level(body, values, reach, (*loops, turn))
        if overflow is None and any(map(_is_bad, out[:count])) and not any(map(_is_bad, carry)):
            overflow = (turn, values)
        carry = list(out[:count])
    return None


def _in_while(
    eqn: Any, inner: list[Any], inputs: list[Any], reach: list[Reach], nan: bool, loops: Any
) -> NonFinite | None:
    first = eqn.params["cond_nconsts"]
    second = first + eqn.params["body_nconsts"]
    test, body = (jax.jit(jex_core.jaxpr_as_fun(x)) for x in inner)
    carry, turn, overflow = list(inputs[second:]), 0, None
    while bool(test(*inputs[:first], *carry)[0]):
        values = [*inputs[first:second], *carry]
        clean, carry = not any(map(_is_bad, carry)), list(body(*values))
        if any(_flags(x)[0 if nan else 1] for x in carry):
            turn, values = overflow or (turn, values)
            return _level(inner[1], values, reach[first:], (*loops, turn))
        if overflow is None and clean and any(map(_is_bad, carry)):
            overflow = (turn, values)
        turn += 1
    return None


def _examples(
    run: Any, traced: Traced, args: tuple[Any, ...], batch_argnum: int | None
) -> tuple[int, ...]:
    """Return the examples that give a non-finite result with every example replaced by them."""
    if batch_argnum is None or batch_argnum >= len(args):
        return ()
    before = sum(len(jax.tree.leaves(a)) for a in args[:batch_argnum])
    own = range(before, before + len(jax.tree.leaves(args[batch_argnum])))
    sizes = {np.shape(traced.flat[i])[0] if np.ndim(traced.flat[i]) else 0 for i in own}
    size = sizes.pop() if len(sizes) == 1 else 0
    found = []
    for example in range(min(size, 256)):
        flat = list(traced.flat)
        for i in own:
            flat[i] = jnp.broadcast_to(flat[i][example], np.shape(flat[i]))
        if any(_is_bad(x) for x in run(*flat)):
            found.append(example)
    return tuple(found) if len(found) < size else ()
