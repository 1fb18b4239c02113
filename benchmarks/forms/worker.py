"""Compile the rows for hardware that is not there, and print what the compiler made of them as JSON.

Run by the Python that has the compiler: ``python worker.py TARGET [small|full]``, where TARGET is such
as ``v5e:1x1``, or ``tpu`` or ``cuda`` for one of each. It needs no device.
"""

import json
import math
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import rows

from fnml.core import abstract
from fnml.plan import parse_target
from fnml.plan._hlo import Instruction, Program, parse
from fnml.plan._traffic import work
from fnml.plan._worker import devices

TARGETS = {"tpu": "v5e:1x1", "cuda": "h200:1x1"}
# What costs a processor nothing to run.
_NO_CALL = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"),
    *("copy-start", "copy-done", "slice-start", "slice-done", "async-start", "async-done"),
    *("async-update", "conditional", "after-all", "opt-barrier"),
}
_CUDNN = re.compile(r'"__cudnn\$conv(BackwardInput|BackwardFilter|BiasActivationForward|Forward)"')
_LABELS = re.compile(r"dim_labels=\w+_(\w+)->")


def compile_one(
    function: Callable[..., Any], row: rows.Row, device: Any, platform: str
) -> dict[str, Any]:
    """Compile a form for one device; say what the program computes, moves and holds.

    ``flops`` and ``bytes`` are counted in the program's text: products, and what passes through main
    memory. ``xla`` is the compiler's own account of bytes, on-chip memory included, where it gives one.
    """
    mesh = jax.sharding.Mesh(np.array([device]), ("one",))
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
        (abstract(row.spec), *row.batch),
    )
    began = time.monotonic()
    compiled = jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).compile()
    text = compiled.as_text()
    program = parse(text)
    found = work(program)
    return {
        "flops": sum(found.flops.values()) + _cudnn_flops(program),
        "bytes": found.bytes,
        "xla": (compiled.cost_analysis() or {}).get("bytes accessed"),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "calls": sum(times for i, times in program.run() if i.opcode not in _NO_CALL),
        "kernels": len(re.findall(r'custom_call_target="(?:tpu_custom_call|mosaic)', text)),
        "seconds": round(time.monotonic() - began, 1),
    }


def _cudnn_flops(program: Program) -> float:
    """Count the products of cuDNN's convolutions, those with padding included."""
    total = 0.0
    for name, times in program.times.items():
        table = {i.name: i for i in program.computations[name]}
        total += times * sum(_convolution(table, i) for i in table.values())
    return total


def _convolution(table: dict[str, Instruction], instruction: Instruction) -> float:
    kind, labels = (p.search(instruction.attributes) for p in (_CUDNN, _LABELS))
    if kind is None or labels is None:
        return 0.0
    first, second = (table[name].arrays[0] for name in instruction.operands[:2])
    result = instruction.arrays[0]
    # Every product belongs to one number of the convolution's result and one of its kernel.
    out, kernel = {
        "BackwardInput": (first, second),
        "BackwardFilter": (second, result),
    }.get(kind.group(1), (result, second))
    features = kernel.shape[labels.group(1).index("o")]
    return 2.0 * math.prod(out.shape) * math.prod(kernel.shape) / features


def main(target: str, sizes: str = "small") -> None:
    """Print a dict of target, row and form."""
    chosen = parse_target(TARGETS.get(target, target))
    request = {
        "platform": chosen.chip.platform,
        "chip": chosen.chip.name,
        "shape": chosen.shape,
        "mesh": {"one": 1},
        "compiler": chosen.chip.compiler,
    }
    device = devices(request)[0]
    found: dict[str, Any] = {}
    for name, row in {"small": rows.small, "full": rows.full}[sizes]().items():
        print(name, file=sys.stderr, flush=True)
        found[name] = {
            form: compile_one(function, row, device, request["platform"])
            for form, function in (("fnml", row.ours), ("textbook", row.textbook))
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
