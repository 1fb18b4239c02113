"""Find what a compiled program says between devices."""

import re
from dataclasses import dataclass

import numpy as np

from fnml.plan._hlo import Instruction, Program, parse

_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_LISTED = re.compile(r"replica_groups=\{(\{.*?\})?\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?(?:=(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{\{(.*?)\}\}")


@dataclass(frozen=True)
class Collective:
    """What one kind of collective moves in one call of a program.

    Attributes:
      kind: such as ``"all-reduce"``.
      count: how often it happens; in a loop, once per turn.
      bytes: what all of them together hand over on one device: of an all-gather the gathered
        array, of a reduce-scatter the array before it, of the others the array itself. What goes
        over the wires follows from it and from the group's size (:func:`wire_bytes`).
      group: how many devices take part with each other.
      members: the positions in the mesh of those of the first group.
    """

    kind: str
    count: int
    bytes: int
    group: int
    members: tuple[int, ...] = ()


def collectives(text: str | Program) -> list[Collective]:
    """List the collectives of ``compiled.as_text()``, alike ones added up, the most bytes first.

    The body of a loop counts once per turn.

    Raises:
      ValueError: the text is no program.

    >>> text = '''HloModule m, num_partitions=8
    ... ENTRY %main (x: f32[256]) -> f32[256] {
    ...   ROOT %y = f32[256]{0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
    ... }'''
    >>> collectives(text)[0]
    Collective(kind='all-reduce', count=1, bytes=1024, group=4, members=(0, 1, 2, 3))
    """
    program = parse(text) if isinstance(text, str) else text
    sums: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for name, times in program.times.items():
        for kind, size, instruction in _inside(program, name):
            members = _members(instruction.attributes) or tuple(range(program.devices))
            if len(members) < 2:
                continue
            entry = sums.setdefault((kind, members), [0, 0])
            entry[0] += times
            entry[1] += times * size
    found = [
        Collective(kind, count, size, len(members), members)
        for (kind, members), (count, size) in sums.items()
    ]
    return sorted(found, key=lambda c: (-c.bytes, c.kind, c.group))


def wire_bytes(collective: Collective) -> float:
    """Return the bytes that each device sends at least, in a ring over its group.

    Source: Thakur, Rabenseifner and Gropp 2005, sections 4.1 to 4.5.

    >>> wire_bytes(Collective("all-reduce", 1, 1024, 4))
    1536.0
    """
    share = (collective.group - 1) / collective.group
    if collective.kind.startswith("collective"):
        return float(collective.bytes)
    return collective.bytes * share * (2 if collective.kind == "all-reduce" else 1)


def _inside(program: Program, name: str) -> list[tuple[str, int, Instruction]]:
    """Return the collectives of a computation, those inside its fusions too."""
    found = []
    instructions = program.computations[name]
    sizes = {i.name: i.nbytes for i in instructions}
    for instruction in instructions:
        kind = instruction.opcode.removesuffix("-start")
        if kind in _KINDS:
            given = sum(sizes.get(operand, 0) for operand in instruction.operands)
            # The start of an asynchronous one results in its operands beside its results.
            started = instruction.opcode.endswith("-start") and kind != "all-reduce"
            made = instruction.nbytes - (given if started else 0)
            # A permute hands over what it is given; its start results in two counters, too.
            size = given if kind == "collective-permute" else max(given, made)
            found.append((kind, size, instruction))
        elif instruction.opcode == "fusion":
            inner = instruction.called.get("calls")
            if inner is not None:
                fused = _inside(program, inner)
                found += [(_scattered(program, inner, k), size, i) for k, size, i in fused]
    return found


def _scattered(program: Program, name: str, kind: str) -> str:
    """Tell an all-reduce of which each device keeps its slice from a plain one."""
    sliced = any(i.opcode == "dynamic-slice" for i in program.computations[name])
    return "reduce-scatter" if kind == "all-reduce" and sliced else kind


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text))


def _members(attributes: str) -> tuple[int, ...]:
    """Return the first group of devices; ``()`` where all of them form one."""
    if iota := _IOTA.search(attributes):
        dims = _numbers(iota.group(3))
        order = _numbers(iota.group(4)) if iota.group(4) else tuple(range(len(dims)))
        ids = np.arange(np.prod(dims)).reshape(dims).transpose(order)
        return tuple(map(int, ids.reshape(int(iota.group(1)), -1)[0]))
    if mesh := _MESH.search(attributes):
        return _along(mesh.group(1), mesh.group(2))
    if pairs := _PAIRS.search(attributes):
        return _cycle(dict(zip(*[iter(_numbers(pairs.group(1)))] * 2, strict=True)))
    if listed := _LISTED.search(attributes):
        return _numbers(listed.group(0).split("}")[0])
    return ()


def _along(axes: str, named: str) -> tuple[int, ...]:
    """Return the group that lies along some axes, or parts of axes, of a named mesh."""
    sizes = {name: int(size) for name, _, _, size in _AXIS.findall(axes)}
    strides, stride = {}, 1
    for name in reversed(sizes):
        strides[name] = stride
        stride *= sizes[name]
    members = np.zeros((1,), np.int64)
    for name, before, part, _ in _AXIS.findall(named):
        size = int(part) if part else sizes[name]
        # A part of an axis: what stands before it is the product of the larger parts.
        step = strides[name] * (sizes[name] // (int(before) * size) if part else 1)
        members = (members[:, None] + np.arange(size)[None, :] * step).reshape(-1)
    return tuple(map(int, members))


def _cycle(targets: dict[int, int]) -> tuple[int, ...]:
    """Return the devices that one device's data would visit."""
    if not targets:
        return ()
    starts = set(targets) - set(targets.values())
    at = min(starts) if starts else min(targets)
    seen = [at]
    while (at := targets.get(at, seen[0])) not in seen:
        seen.append(at)
    return tuple(seen)
