"""Compile every row for hardware that is not there, and print what the compiler said as JSON.

The first target of a platform takes all rows, the others one of each kernel. Run by
``test_compiled.py`` (``elsewhere.run``). It needs no device and no driver.
"""

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TARGETS = {"tpu": ("v5e:2x2", "v6e:2x2"), "cuda": ("h200:1x1",)}


def main(platform: str) -> None:
    import kernel_cases
    from elsewhere import devices

    rows = []
    for target in TARGETS[platform]:
        name, device = target.partition(":")[0], devices(target)[0]
        chosen = cases(platform)
        if target != TARGETS[platform][0]:
            chosen = kernel_cases.one_per_kernel(chosen, platform)
        rows += [
            compile_one(case, name, device, platform) | {"oversized": False} for case in chosen
        ]
        with oversized():
            rows.append(
                compile_one(too_large(platform), name, device, platform) | {"oversized": True}
            )
    print(json.dumps(rows))


def cases(platform: str) -> list[Any]:
    import kernel_cases

    return [case for case in kernel_cases.all_cases() if case.calls.get(platform)]


@contextlib.contextmanager
def oversized() -> Iterator[None]:
    """Make the tiles of attention larger than on-chip memory."""
    from fnml.pallas_kernels.attention import _blocks

    tpu, cuda = dict(_blocks.TPU), dict(_blocks.CUDA)
    _blocks.TPU[128, 2] = _blocks.Blocks(16, 65536, 16, 65536)
    _blocks.CUDA[128] = _blocks.GPUBlocks(512, 512, 512)
    try:
        yield
    finally:
        _blocks.TPU.update(tpu)
        _blocks.CUDA.update(cuda)


def too_large(platform: str) -> Any:
    """Return the row that does not fit with those tiles."""
    from functools import partial

    import jax.numpy as jnp
    from kernel_cases import Case, shape

    from fnml.pallas_kernels import attention

    lengths = {"tpu": (16, 65536), "cuda": (128, 1024)}[platform]
    q, k = (shape(1, length, 1, 128, dtype=jnp.bfloat16) for length in lengths)
    return Case("oversized", partial(attention, implementation="pallas"), (q, k, k), {})


def compile_one(case: Any, target: str, device: Any, platform: str) -> dict[str, Any]:
    """Compile one row; an error becomes its text, so that one run reports every row."""
    import jax
    import numpy as np

    mesh = jax.sharding.Mesh(np.array([device]), ("one",))
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole) for a in case.arguments]
    row: dict[str, Any] = {"case": case.name, "target": target}
    dump = Path(tempfile.mkdtemp())
    if platform == "cuda":
        os.environ |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": str(dump)}
    try:
        traced = jax.jit(case.function).trace(*arguments)
        compiled = traced.lower(lowering_platforms=(platform,)).compile()
    except Exception as error:  # noqa: BLE001 - whatever the compiler says is the finding
        return row | {"error": f"{type(error).__name__}: {error}"[:2000]}
    memory = compiled.memory_analysis()
    row["temporary_bytes"] = memory.temp_size_in_bytes
    row["hlo_calls"] = len(
        re.findall(r"custom_call_target=\"(?:tpu_custom_call|mosaic)", compiled.as_text())
    )
    if platform == "cuda":
        row["ptxas"] = [ptxas(path.read_text()) for path in sorted(dump.glob("**/*.ptxas"))]
    return row


def ptxas(text: str) -> dict[str, int]:
    """Read the assembler's report of one kernel."""
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", text))
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
    return {"spilled_bytes": spills, "registers": max(registers, default=0)}


if __name__ == "__main__":
    main(sys.argv[1])
