"""Name what a jaxpr computes: by checkpoint name, by scope, by the function that computed it."""

import dis
import functools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

from jax.extend import core as jex_core
from jax.extend import source_info_util

from fnml.transforms import _walk
from fnml.transforms._walk import Site, bodies

# Frames of these packages are none of the user's code.
_FRAMEWORKS = ("jax", "jaxlib", "flax", "equinox", "haiku")
_WRAPPERS = re.compile(r"\b(?:jvp|vmap|pmap|transpose|remat|checkpoint)\(|\)")


class Frame(NamedTuple):
    """One call on the way to an equation: the function, and the line and instruction reached."""

    file: str
    line: int
    function: str
    code: CodeType
    position: int


class Named(NamedTuple):
    """A value with a name.

    Attributes:
      name: segments joined with ``/``.
      site: the equation that computes it.
      output: which of the equation's results it is.
      aval: its shape and dtype where it is computed.
    """

    name: str
    site: Site
    output: int
    aval: Any


def _directories() -> tuple[str, ...]:
    modules = [sys.modules[name] for name in _FRAMEWORKS if name in sys.modules]
    return ("<frozen", *(str(Path(m.__file__ or "<frozen").parent) + os.sep for m in modules))


def frames(eqn: Any) -> list[Frame]:
    """Return the user's calls that led to an equation, outermost first.

    Calls outside of the traced function are left out, if it was traced by :func:`_walk.trace`.
    """
    traceback, frameworks = eqn.source_info.traceback, _directories()
    found: list[Frame] = []
    if traceback is None:
        return found
    codes, positions = traceback.raw_frames()
    for frame, code, position in zip(traceback.frames, codes, positions, strict=True):
        if frame.file_name == _walk.__file__:
            if frame.function_name.endswith("call"):
                break
            continue
        if not frame.file_name.startswith(frameworks):
            function = frame.function_name.rsplit(".", 1)[-1]
            found.append(Frame(frame.file_name, frame.line_num, function, code, position))
    return found[::-1]


def source(eqn: Any) -> str:
    """Return the line of the user's code that an equation comes from: ``file:line (function)``."""
    own = frames(eqn)
    if own:
        return f"{own[-1].file}:{own[-1].line} ({own[-1].function})"
    return source_info_util.summarize(eqn.source_info)


def scopes(eqn: Any) -> tuple[str, ...]:
    """Return the named scopes around an equation; ``backward`` leads those of a backward pass."""
    text = str(eqn.source_info.name_stack)
    plain = tuple(part for part in _WRAPPERS.sub("", text).split("/") if part)
    return ("backward", *plain) if "transpose(" in text else plain


def named(closed: Any) -> list[Named]:
    """List every value that has a name, in program order; equal names are numbered.

    A value has the name given with ``checkpoint_name``, after the scopes around it. The results
    of a scope (``jax.named_scope``, a flax module) and of each of the user's functions (those
    values that code outside of it reads) have its path; several results end in ``/0``, ``/1``.
    """
    found: list[Named] = []
    taken: dict[str, int] = {}
    there: set[tuple[str, Site, int]] = set()
    for name, site, output, aval in sorted(_level(closed, (), (), ()), key=lambda n: n.site):
        if (name, site, output) in there:
            continue
        there.add((name, site, output))
        count = taken[name] = taken.get(name, -1) + 1
        found.append(Named(f"{name}.{count}" if count else name, site, output, aval))
    return found


def _level(
    closed: Any, site: Site, outer: tuple[str, ...], calls: tuple[tuple[str, int], ...]
) -> Iterator[Named]:
    jaxpr = closed.jaxpr
    last = last_reads(jaxpr, jaxpr.eqns)
    stacks = [joined(outer, scopes(eqn)) for eqn in jaxpr.eqns]
    paths, places = [], []
    for eqn in jaxpr.eqns:
        called = frames(eqn)
        paths.append(within(calls, _calls(called)))
        places.append(_places(called, len(paths[-1])))
    for i, eqn in enumerate(jaxpr.eqns):
        if eqn.primitive.name == "name":
            name = "/".join((*stacks[i], eqn.params["name"]))
            yield Named(name, (*site, i), 0, eqn.outvars[0].aval)
        if eqn.primitive.name in ("jit", "pjit") and not eqn.params["name"].startswith("<"):
            own = (*(name for name, _ in paths[i]), eqn.params["name"])
            yield from _results(jaxpr, last, site, i, i + 1, "/".join(own))
        for k, body in enumerate(bodies(eqn)):
            yield from _level(body, (*site, i, k), stacks[i], paths[i])
    scoped = [tuple((part, 0) for part in stack) for stack in stacks]
    nowhere: list[tuple[Any, ...]] = [() for _ in jaxpr.eqns]
    for keys, at, least in ((scoped, nowhere, len(outer)), (paths, places, len(calls))):
        for start, stop, key in _runs(keys, at, least):
            name = "/".join(part for part, _ in key)
            yield from _results(jaxpr, last, site, start, stop, name)


def joined(outer: tuple[str, ...], own: tuple[str, ...]) -> tuple[str, ...]:
    """Join the scopes around a body with those inside."""
    if outer[:1] == ("backward",) == own[:1]:
        own = own[1:]
    return (*outer, *own)


def within(
    outer: tuple[tuple[str, int], ...], own: tuple[tuple[str, int], ...]
) -> tuple[tuple[str, int], ...]:
    """Join the calls around a body with those inside, which may repeat them."""
    return own if own[: len(outer)] == outer else (*outer, *own)


def functions(eqn: Any) -> tuple[tuple[str, int], ...]:
    """Return the functions around an equation, each with the line that it was called from."""
    return _calls(frames(eqn))


def _calls(own: list[Frame]) -> tuple[tuple[str, int], ...]:
    result, line = [], 0
    for frame in own:
        if not frame.function.startswith("<"):
            result.append((frame.function, line))
        line = frame.line
    return tuple(result)


def _places(calls: list[Frame], length: int) -> tuple[Any, ...]:
    """Return for each function of a path of ``length`` its code and the instruction reached."""
    own = [(f.code, f.position) for f in calls if not f.function.startswith("<")]
    return (*[None] * (length - len(own)), *own)


@functools.cache
def _loops(code: CodeType) -> tuple[tuple[int, int], ...]:
    """Return the first and last instruction of every loop."""
    steps = dis.get_instructions(code)
    return tuple((s.argval, s.offset) for s in steps if s.opname.startswith("JUMP_BACKWARD"))


def _called_again(before: Any, after: Any) -> bool:
    """Tell whether code that went back to an earlier instruction did so outside of its loops."""
    if before is None or after is None or after[1] >= before[1]:
        return False
    return not any(first <= after[1] and before[1] <= last for first, last in _loops(before[0]))


def _runs(
    keys: list[tuple[Any, ...]], places: list[tuple[Any, ...]], least: int
) -> Iterator[tuple[int, int, tuple[Any, ...]]]:
    """Yield every run of equations that share a prefix longer than ``least``.

    Two calls of a function from one line, in a loop, are two runs: it began anew in between.
    """
    depth = max((len(key) for key in keys), default=0)
    for length in range(least + 1, depth + 1):
        start = 0
        for i in range(1, len(keys) + 1):
            prefix = keys[start][:length]
            ends = i == len(keys) or keys[i][:length] != prefix
            if not ends and len(places[i]) >= length <= len(places[i - 1]):
                depths = range(least, length)
                ends = any(_called_again(places[i - 1][d], places[i][d]) for d in depths)
            if ends:
                if len(prefix) == length:
                    yield start, i, prefix
                start = i


def _results(
    jaxpr: Any, last: dict[Any, int], site: Site, start: int, stop: int, name: str
) -> Iterator[Named]:
    """Yield what equations ``start`` to ``stop`` compute and later ones read."""
    own = [
        (i, k, v)
        for i in range(start, stop)
        for k, v in enumerate(jaxpr.eqns[i].outvars)
        if last.get(v, -1) >= stop
    ]
    for number, (i, k, v) in enumerate(own):
        yield Named(f"{name}/{number}" if len(own) > 1 else name, (*site, i), k, v.aval)


def last_reads(jaxpr: Any, eqns: list[Any]) -> dict[Any, int]:
    """Return for each variable the last equation that reads it; their number for a result."""
    last = {
        atom: i
        for i, eqn in enumerate(eqns)
        for atom in eqn.invars
        if not isinstance(atom, jex_core.Literal)
    }
    return last | {a: len(eqns) for a in jaxpr.outvars if not isinstance(a, jex_core.Literal)}
