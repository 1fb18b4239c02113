"""Count what a compiled program computes and moves on one chip, loops by their turns."""

import json
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fnml.plan._hlo import Instruction, Program

_FREE = frozenset(
    (
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"),
        *("conditional", "after-all", "partition-id", "replica-id", "opt-barrier", "domain"),
        *("async-start", "async-update", "async-done", "copy-done", "slice-done", "send-done"),
        *("recv-done", "all-gather-done", "all-reduce-done", "collective-permute-done"),
    )
)
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
_DIMS = re.compile(r"\b(lhs|rhs)_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_GEMM = re.compile(r'"lhs_contracting_dimensions":\["?([\d",]*)\]')
_ESTIMATE = re.compile(r'"cost_estimate":(\{[^{}]*\})')
_KERNEL = re.compile(r'custom_call_target="(?:tpu_custom_call|mosaic)')
_SCOPE = re.compile(r'op_name="([^"]*)"')

Computation = Mapping[str, Instruction]


class Work(NamedTuple):
    """What one chip does in one call of a program.

    Attributes:
      flops: of matrix products, convolutions and kernels, by the dtype of their operands.
      bytes: what is read from and written to main memory, if each fused operation reads its
        operands and writes its result once.
      kept: bytes that the forward pass leaves for the backward pass.
      unstated: calls of hand-written kernels that do not state their FLOPs.
    """

    flops: Mapping[str, float]
    bytes: float
    kept: int
    unstated: int = 0


def work(program: Program) -> Work:
    """Count a program's FLOPs and bytes, and what its backward pass reads of its forward pass."""
    tables = {name: {i.name: i for i in body} for name, body in program.computations.items()}
    flops: dict[str, float] = {}
    moved, unstated = 0.0, 0
    for name, times in program.times.items():
        for instruction in tables[name].values():
            for dtype, count in _flops(tables, tables[name], instruction):
                flops[dtype] = flops.get(dtype, 0.0) + times * count
            moved += times * _moved(tables, tables[name], instruction)
            if is_kernel(instruction) and not _estimate(instruction):
                unstated += times
    kept = max((_kept(tables, name) for name in program.times), default=0)
    return Work(flops, moved, kept, unstated)


def is_kernel(instruction: Instruction) -> bool:
    """Tell a hand-written kernel from all other operations."""
    return (
        instruction.opcode == "custom-call" and _KERNEL.search(instruction.attributes) is not None
    )


def _flops(
    tables: Mapping[str, Computation], table: Computation, instruction: Instruction
) -> list[tuple[str, float]]:
    if instruction.opcode == "fusion":
        inner = tables[instruction.called["calls"]]
        return [pair for i in inner.values() for pair in _flops(tables, inner, i)]
    operands = [table[name] for name in instruction.operands if name in table]
    if not operands or not operands[0].arrays or not instruction.arrays:
        return []
    left, out = operands[0].arrays[0], instruction.arrays[0]
    if instruction.opcode == "dot":
        dims = dict(_DIMS.findall(instruction.attributes)).get("lhs", "")
        contracted = math.prod(left.shape[int(d)] for d in dims.split(",") if d)
        return [(left.dtype, 2.0 * math.prod(out.shape) * contracted)]
    if instruction.opcode == "convolution":
        count = _convolution(instruction, left.shape, operands[1].arrays[0].shape, out.shape)
        return [(left.dtype, count)]
    if instruction.opcode == "custom-call":
        if gemm := _GEMM.search(instruction.attributes):
            dims = re.findall(r"\d+", gemm.group(1))
            contracted = math.prod(left.shape[int(d)] for d in dims)
            return [(left.dtype, 2.0 * math.prod(out.shape) * contracted)]
        if stated := _estimate(instruction):
            return [(left.dtype, float(stated.get("flops", 0)))]
    return []


def _estimate(instruction: Instruction) -> dict[str, float]:
    """Return what a kernel says of itself."""
    found = _ESTIMATE.search(instruction.attributes)
    return {k: float(v) for k, v in json.loads(found.group(1)).items()} if found else {}


def _convolution(
    instruction: Instruction,
    left: tuple[int, ...],
    right: tuple[int, ...],
    out: tuple[int, ...],
) -> float:
    """Count products with what is there, not with padding or with the holes of a dilation.

    A TPU has batched matrix products as convolutions whose windows are mostly such holes.
    """
    labels = _LABELS.search(instruction.attributes)
    if labels is None:
        return 0.0
    ins, kernel, outs = labels.groups()
    window = _WINDOW.search(instruction.attributes)
    fields = dict(f.split("=") for f in window.group(1).split()) if window else {}
    pairs = 1
    for d in range(len(ins) - 2):
        size, places = left[ins.index(str(d))], out[outs.index(str(d))]
        taps = right[kernel.index(str(d))]
        low = int(_field(fields, "pad", d, "0_0").split("_")[0])
        holes, apart = (int(_field(fields, k, d, "1")) for k in ("lhs_dilate", "rhs_dilate"))
        starts = np.arange(places) * int(_field(fields, "stride", d, "1")) - low
        at = starts[:, None] + np.arange(taps)[None, :] * apart
        pairs *= int(np.sum((at >= 0) & (at <= (size - 1) * holes) & (at % holes == 0)))
    plain = math.prod(out[outs.index(c)] for c in "bf")
    return 2.0 * pairs * plain * right[kernel.index("i")]


def _field(fields: Mapping[str, str], name: str, at: int, default: str) -> str:
    return fields[name].split("x")[at] if name in fields else default


def _main(instruction: Instruction) -> int:
    return sum(array.nbytes for array in instruction.arrays if array.main)


def _moved(
    tables: Mapping[str, Computation], table: Computation, instruction: Instruction
) -> float:
    if instruction.opcode in _FREE:
        return 0.0
    operands = [table[name] for name in instruction.operands if name in table]
    if instruction.opcode in ("copy-start", "slice-start"):
        # Its result lists the destination first, and then the source again.
        made = instruction.arrays[0].nbytes
        return sum(made for a in (instruction.arrays[0], operands[0].arrays[0]) if a.main)
    if instruction.opcode == "fusion":
        inner = tables[instruction.called["calls"]]
        read = _reads(tables, inner)
        sizes = (
            min(_main(operand), read.get(i, _main(operand))) for i, operand in enumerate(operands)
        )
        return sum(sizes) + min(_main(instruction), _written(inner))
    if instruction.opcode in _SLICES:
        return 2.0 * _main(instruction)
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * _main(operands[1])
    if instruction.opcode == "custom-call" and (stated := _estimate(instruction)):
        return stated.get("bytes_accessed", 0.0)
    started = instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start"
    read_back = sum(map(_main, operands))
    return max(_main(instruction), read_back) if started else _main(instruction) + read_back


def _reads(tables: Mapping[str, Computation], inner: Computation) -> dict[int, int]:
    """Return how many bytes a fusion reads of those parameters that it reads in part."""
    users: dict[str, list[Instruction]] = {}
    for instruction in inner.values():
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)

    def part(name: str) -> int | None:
        total = 0
        for user in users.get(name, []):
            if user.opcode == "bitcast":
                of_user = part(user.name)
            elif user.opcode in _SLICES and user.operands[0] == name:
                of_user = user.nbytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                of_user = 0
            elif user.opcode == "fusion":
                deeper = _reads(tables, tables[user.called["calls"]])
                of_user = deeper.get(user.operands.index(name))
            else:
                of_user = None
            if of_user is None:
                return None
            total += of_user
        return total

    found = {
        int(i.literal): part(i.name)
        for i in inner.values()
        if i.opcode == "parameter" and i.literal.isdecimal()
    }
    return {number: size for number, size in found.items() if size is not None}


def _written(inner: Computation) -> int:
    """Return how many bytes a fusion writes: of an array updated in place, the update."""
    (root,) = (i for i in inner.values() if i.root)
    results = [inner[n] for n in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for result in results:
        while result.opcode == "bitcast" and result.operands[0] in inner:
            result = inner[result.operands[0]]
        updated = result.opcode == "dynamic-update-slice"
        total += inner[result.operands[1]].nbytes if updated else result.nbytes
    return total


def _pass(instruction: Instruction) -> str:
    """Tell which pass an instruction belongs to, by the names that JAX's derivatives leave."""
    scope = _SCOPE.search(instruction.attributes)
    if scope is None:
        return ""
    return (
        "backward"
        if "transpose(" in scope.group(1)
        else "forward"
        if "jvp(" in scope.group(1)
        else ""
    )


def _kept(tables: Mapping[str, Computation], name: str) -> int:
    """Return the bytes of what forward instructions make and backward ones read."""
    table = tables[name]

    def origin(value: str, index: int | None) -> tuple[str, int | None]:
        """Look through tuples and views, and through loops that hand an element on."""
        while value in table:
            instruction = table[value]
            if instruction.opcode == "get-tuple-element":
                found = re.search(r"index=(\d+)", instruction.attributes)
                value, index = instruction.operands[0], int(found.group(1)) if found else 0
            elif instruction.opcode == "tuple" and index is not None:
                value, index = instruction.operands[index], None
            elif instruction.opcode in ("bitcast", "copy-done", "opt-barrier") or (
                instruction.opcode == "while"
                and index is not None
                and _handed_on(tables[instruction.called["body"]], index)
            ):
                value = instruction.operands[0]
            else:
                break
        return value, index

    kept: dict[tuple[str, int | None], int] = {}
    for instruction in table.values():
        if _pass(instruction) != "backward":
            continue
        wanted: list[tuple[str, int | None]] = [(operand, None) for operand in instruction.operands]
        if instruction.opcode == "while":
            carry = table[instruction.operands[0]]
            if carry.opcode == "tuple":
                wanted = [(operand, None) for operand in carry.operands]
        for operand, index in wanted:
            source = origin(operand, index)
            made = table.get(source[0])
            if made is None or _pass(made) != "forward" or made.opcode in _FREE - {"while"}:
                continue
            arrays = made.arrays if source[1] is None else made.arrays[source[1] : source[1] + 1]
            kept[source] = sum(a.nbytes for a in arrays if a.main)
    return sum(kept.values())


def _handed_on(body: Computation, index: int) -> bool:
    """Tell whether a loop's body gives back an element of its carry as it got it."""
    (root,) = (i for i in body.values() if i.root)
    if root.opcode != "tuple" or index >= len(root.operands):
        return False
    element = body[root.operands[index]]
    given = re.search(r"index=(\d+)", element.attributes)
    source = body.get(element.operands[0]) if element.operands else None
    return (
        element.opcode == "get-tuple-element"
        and given is not None
        and int(given.group(1)) == index
        and source is not None
        and source.opcode == "parameter"
    )
