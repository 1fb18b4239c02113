"""Read an optimised program's text: its computations, and how often each is run."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "c64": 64, "c128": 128, "token": 0}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(condition|body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^{}]*)\}")
_INDEX = re.compile(r"\bindex=(\d+)")
_DEVICES = re.compile(r"\b(?:num_partitions|replica_count)=(\d+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Array(NamedTuple):
    """One array of a result: its dtype, its shape, and whether it lies in a chip's main memory."""

    dtype: str
    shape: tuple[int, ...]
    main: bool

    @property
    def nbytes(self) -> int:
        """The bytes of its elements, without a layout's padding."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            found = re.search(r"\d+", self.dtype)
            bits = int(found.group()) if found else 0
        return -(-math.prod(self.shape) * bits // 8)


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
      name: unique in its computation.
      opcode: such as ``"fusion"``.
      arrays: the arrays of its result, those of a tuple flattened.
      operands: names of instructions of the same computation.
      literal: what stands between the parentheses, of a constant or parameter its value or number.
      attributes: the rest of the line.
      root: whether it is its computation's result.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool

    @property
    def called(self) -> dict[str, str]:
        """The computations it calls, by role; the branches of a ``conditional`` by number."""
        found = dict(_CALLED.findall(self.attributes))
        if branches := _BRANCHES.search(self.attributes):
            found |= {str(i): n for i, n in enumerate(_NAME.findall(branches.group(1)))}
        return found

    @property
    def nbytes(self) -> int:
        """The bytes of its result."""
        return sum(array.nbytes for array in self.arrays)


class Program(NamedTuple):
    """An optimised program.

    Attributes:
      computations: their instructions, by name.
      entry: the name of the one that is run.
      times: how often each computation is run in one call of the program; what is fused into an
        instruction, and what a reduction applies, is not in here.
      devices: how many it is divided over.
      unbounded: the loops whose number of turns is not in the text; they count as one.
    """

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str
    times: Mapping[str, int]
    devices: int
    unbounded: tuple[str, ...]

    def run(self) -> Iterator[tuple[Instruction, int]]:
        """Yield every instruction that is run, and how often."""
        for name, times in self.times.items():
            for instruction in self.computations[name]:
                yield instruction, times


def parse(text: str) -> Program:
    """Read the text of ``compiled.as_text()``.

    Raises:
      ValueError: the text has no entry computation.

    >>> program = parse('''ENTRY %main (x: f32[2]) -> f32[2] {
    ...   ROOT %y = f32[2]{0} negate(%x)
    ... }''')
    >>> [(i.opcode, i.nbytes, times) for i, times in program.run()]
    [('negate', 8, 1)]
    """
    computations: dict[str, tuple[Instruction, ...]] = {}
    current: list[Instruction] = []
    entry = name = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name, current = header.group(2), []
            entry = name if header.group(1) else entry
        elif line.startswith("}"):
            computations[name] = tuple(current)
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(found.group(2), found.group(3), bool(found.group(1)))
            if instruction is not None:
                current.append(instruction)
    if not entry:
        raise ValueError("this text has no ENTRY computation: pass compiled.as_text()")
    times: dict[str, int] = {}
    unbounded: list[str] = []
    _visit(computations, entry, 1, times, unbounded)
    stated = _DEVICES.findall(text.split("\n", 1)[0])
    devices = max([1, *map(int, stated)])
    return Program(computations, entry, times, devices, tuple(unbounded))


def _instruction(name: str, rest: str, root: bool) -> Instruction | None:
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    opcode = _OPCODE.match(rest, end)
    if end < 0 or opcode is None:
        return None
    close = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : close - 1]
    arrays = tuple(
        Array(dtype, tuple(map(int, shape.split(","))) if shape else (), "S(" not in layout)
        for dtype, shape, layout in _ARRAY.findall(rest[:end])
    )
    operands = tuple(_NAME.findall(inside))
    return Instruction(name, opcode.group(1), arrays, operands, inside, rest[close:], root)


def _closing(text: str, start: int = 0) -> int:
    """Return where the parenthesis that opens at ``start`` has been closed."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] == "(":
            depth += 1
        elif text[i] == ")":
            depth -= 1
            if not depth:
                return i + 1
    return len(text)


def _visit(
    computations: Mapping[str, tuple[Instruction, ...]],
    name: str,
    times: int,
    counts: dict[str, int],
    unbounded: list[str],
) -> None:
    """Add how often a computation, and what it calls, is run."""
    counts[name] = counts.get(name, 0) + times
    for instruction in computations[name]:
        called = instruction.called
        if instruction.opcode == "while":
            turns = _turns(computations, name, instruction)
            if turns is None:
                unbounded.append(instruction.name)
                turns = 1
            if turns:
                _visit(computations, called["body"], times * turns, counts, unbounded)
        elif instruction.opcode in ("call", "conditional", "async-start"):
            # Which branch is taken is not known: every one counts.
            for inner in called.values():
                _visit(computations, inner, times, counts, unbounded)


def _turns(
    computations: Mapping[str, tuple[Instruction, ...]], caller: str, loop: Instruction
) -> int | None:
    """Return how often a loop turns: what the compiler noted, or what its condition says."""
    if noted := _TRIPS.search(loop.attributes):
        return int(noted.group(1))
    condition = {i.name: i for i in computations[loop.called["condition"]]}
    (root,) = (i for i in condition.values() if i.root)
    compare = root
    if root.opcode == "fusion":
        inner = computations.get(root.called.get("calls", ""), ())
        compare = next((i for i in inner if i.root), root)
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None
    if len(root.operands) != 2 or any(name not in condition for name in root.operands):
        return None
    counter, limit = (condition[name] for name in root.operands)
    index = _INDEX.search(counter.attributes)
    stop = _integer(limit)
    if counter.opcode != "get-tuple-element" or index is None or stop is None:
        return None
    outside = {i.name: i for i in computations[caller]}
    start = _start(outside, outside.get(loop.operands[0]), int(index.group(1)))
    step = _step(computations[loop.called["body"]], int(index.group(1)))
    return None if start is None or step < 1 else max(0, -(-(stop - start) // step))


def _start(outside: Mapping[str, Instruction], carry: Instruction | None, index: int) -> int | None:
    """Return the constant that a loop's counter begins with."""
    if carry is None or carry.opcode != "tuple" or index >= len(carry.operands):
        return None
    value = outside.get(carry.operands[index])
    while value is not None and value.opcode in ("copy", "bitcast", "convert") and value.operands:
        value = outside.get(value.operands[0])
    return None if value is None else _integer(value)


def _step(body: tuple[Instruction, ...], index: int) -> int:
    """Return by how much a turn moves the counter; 0 if the body does not say so.

    A compiler that unrolls a loop adds several at once, or one several times.
    """
    table = {i.name: i for i in body}
    (root,) = (i for i in body if i.root)
    value = table.get(root.operands[index]) if index < len(root.operands) else None
    total = 0
    while value is not None and value.opcode in ("add", "copy", "bitcast"):
        operands = [table[name] for name in value.operands if name in table]
        constants = [n for n in map(_integer, operands) if n is not None]
        others = [i for i in operands if _integer(i) is None]
        if len(others) != 1:
            return 0
        total, value = total + sum(constants), others[0]
    found = _INDEX.search(value.attributes) if value is not None else None
    same = value is not None and value.opcode == "get-tuple-element" and found is not None
    return total if same and found is not None and int(found.group(1)) == index else 0


def _integer(instruction: Instruction) -> int | None:
    if instruction.opcode != "constant":
        return None
    try:
        return int(json.loads(instruction.literal))
    except (ValueError, TypeError):
        return None
