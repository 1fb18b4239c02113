"""Compile every row for hardware that is not there, and print what the compiler said as JSON.

Run by ``test_compiled.py`` with a Python that has libtpu or the CUDA plugin:
``python compile_kernels.py tpu`` or ``... cuda``. It needs no device and no driver.
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

TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 150754820096 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H200"
"""


def main(platform: str) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    if platform == "tpu":
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1",
            # Other tests may be compiling at the same time.
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-16",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }
    else:
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    rows = []
    for name, device in devices(platform):
        rows += [
            compile_one(case, name, device, platform) | {"oversized": False}
            for case in cases(platform)
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


def devices(platform: str) -> list[tuple[str, Any]]:
    from jax._src import xla_bridge
    from jax.experimental import topologies

    if platform == "tpu":
        return [
            (name, topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0])
            for name, topology in TPUS.items()
        ]
    xla_bridge.backends()  # registers the plugin
    topology = topologies.get_topology_desc("", "cuda", target_config=H200, topology="1x1x1")
    return [("H200", topology.devices[0])]


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
