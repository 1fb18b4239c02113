"""Write calls inline, and control flow as If, Loop and Scan."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fnml.interop.onnx._builder import Builder, Lowering, Port, physical
from fnml.interop.onnx._inline import inline
from fnml.interop.onnx._shapes import is_static
from fnml.transforms._walk import bodies

_INT64, _BOOL = np.dtype(np.int64), np.dtype(bool)


def _call(g: Builder, eqn: Any, *inputs: str) -> list[str]:
    [body] = bodies(eqn)
    return inline(g, body, inputs)


def _ports(atoms: Sequence[Any], names: Sequence[str] | None = None) -> list[Port]:
    shapes = [physical(getattr(atom, "aval", atom)) for atom in atoms]
    return [
        Port(f"in_{i}" if names is None else names[i], dtype, shape)
        for i, (shape, dtype) in enumerate(shapes)
    ]


def _dtypes(atoms: Sequence[Any]) -> tuple[np.dtype[Any], ...]:
    return tuple(physical(atom.aval)[1] for atom in atoms)


def _listed(out: Any, count: int) -> list[str]:
    return [out] if count == 1 else list(out)


def _platform_index(g: Builder, eqn: Any, *_: str) -> str:
    """Choose the branch for every platform: the reference form of a kernel."""
    platforms = eqn.params["platforms"]
    chosen = platforms.index(None) if None in platforms else 0
    return g.constant(np.array(chosen, np.int32))


def _empty(g: Builder, eqn: Any, *_: str) -> str:
    """Write a number that nothing reads, of which a loop makes what it fills."""
    return g.constant(np.zeros((), eqn.params["dtype"]))


def _cond(g: Builder, eqn: Any, which: str, *inputs: str) -> list[str]:
    branches = bodies(eqn)
    known = g.constants.get(which)
    if known is not None:
        return inline(g, branches[int(np.clip(known, 0, len(branches) - 1))], inputs)
    if not eqn.outvars:
        return []
    count, shapes = len(eqn.outvars), [physical(v.aval)[0] for v in eqn.outvars]

    def choose(number: int) -> list[str]:
        """Choose among the branches from ``number`` on."""
        if number == len(branches) - 1:
            return inline(g, branches[number], inputs)
        here = g("LessOrEqual", which, number) if g.dtypes[which] != _BOOL else g("Not", which)
        out = g(
            "If",
            here,
            count=count,
            dtype=_dtypes(eqn.outvars),
            then_branch=g.subgraph([], lambda: inline(g, branches[number], inputs), shapes),
            else_branch=g.subgraph([], lambda: choose(number + 1), shapes),
        )
        return _listed(out, count)

    return choose(0)


def _while(g: Builder, eqn: Any, *inputs: str) -> list[str]:
    test, body = bodies(eqn)
    first = eqn.params["cond_nconsts"]
    second = first + eqn.params["body_nconsts"]
    tested, fixed, start = inputs[:first], inputs[first:second], inputs[second:]
    count = len(start)
    if not count:
        return []

    def turn(_: str, going: str, *carry: str) -> list[str]:
        out = inline(g, body, (*fixed, *carry))
        [more] = inline(g, test, (*tested, *out))
        return [more, *out]

    ports = [Port("turn", _INT64, ()), Port("going", _BOOL, ()), *_ports(eqn.outvars)]
    shapes = [(), *(physical(v.aval)[0] for v in eqn.outvars)]
    [going] = inline(g, test, (*tested, *start))
    graph = g.subgraph(ports, turn, shapes)
    out = g("Loop", None, going, *start, count=count, dtype=_dtypes(eqn.outvars), body=graph)
    return _listed(out, count)


def _scan(g: Builder, eqn: Any, *inputs: str) -> list[str]:
    [body] = bodies(eqn)
    fixed_count, carried = eqn.params["num_consts"], eqn.params["num_carry"]
    length, back = eqn.params["length"], bool(eqn.params["reverse"])
    fixed, rest = inputs[:fixed_count], inputs[fixed_count:]
    start, rows = rest[:carried], rest[carried:]
    if not eqn.outvars:
        return []
    if is_static(length) and length <= max(g.unroll, 1):
        return _unrolled(g, eqn, body, fixed, start, rows)
    ports = _ports(body.in_avals[fixed_count:])
    if not rows:
        # Scan needs something to go along.
        rows = (g.expand(g.constant(np.zeros((), np.bool_)), (), [length]),)
        ports.append(Port("turn", _BOOL, ()))
    plain = len(body.in_avals) - fixed_count

    def turn(*values: str) -> list[str]:
        return inline(g, body, (*fixed, *values[:plain]))

    graph = g.subgraph(ports, turn, [physical(aval)[0] for aval in body.out_avals])
    count, stacked = len(eqn.outvars), len(eqn.outvars) - carried
    out = g(
        "Scan",
        *start,
        *rows,
        count=count,
        dtype=_dtypes(eqn.outvars),
        body=graph,
        num_scan_inputs=len(rows),
        scan_input_directions=[1] * len(rows) if back else None,
        scan_output_directions=[1] * stacked if back and stacked else None,
    )
    return _listed(out, count)


def _unrolled(
    g: Builder,
    eqn: Any,
    body: Any,
    fixed: Sequence[str],
    start: Sequence[str],
    rows: Sequence[str],
) -> list[str]:
    length, carry = int(eqn.params["length"]), list(start)
    turns: list[list[str]] = []
    for i in range(length)[:: -1 if eqn.params["reverse"] else 1]:
        parts = [g("Gather", x, np.array(i, np.int64), axis=0) for x in rows]
        out = inline(g, body, (*fixed, *carry, *parts))
        carry, stacked = out[: len(carry)], out[len(carry) :]
        turns.append(stacked)
    if eqn.params["reverse"]:
        turns.reverse()
    results = list(carry)
    for k, variable in enumerate(eqn.outvars[len(carry) :]):
        parts = [g("Unsqueeze", turn[k], g.axes(0)) for turn in turns]
        if parts:
            results.append(g("Concat", *parts, axis=0) if len(parts) > 1 else parts[0])
        else:
            shape, dtype = physical(variable.aval)
            results.append(g.constant(np.zeros(shape, dtype)))
    return results


LOWERINGS: Mapping[str, Lowering] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call"), _call),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), _call),
    **dict.fromkeys(("remat", "remat2", "checkpoint"), _call),
    "empty2": _empty,
    "platform_index": _platform_index,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}
