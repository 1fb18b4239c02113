"""Compile every parallel form for hardware that is not there, and print what it sends as JSON.

Run by ``test_parallel_forms.py`` with a Python that has libtpu or the CUDA plugin:
``python compile_parallel_forms.py tpu`` (v5e, 4x4) or ``... cuda`` (8 H100). It needs no device.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3350000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 85899345920 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H100"
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
    chips = devices(platform)
    from parallel_forms import CASES

    print(json.dumps([compile_one(name, build, chips, platform) for name, build in CASES]))


def devices(platform: str) -> Sequence[Any]:
    from jax._src import xla_bridge
    from jax.experimental import topologies

    if platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    xla_bridge.backends()  # registers the plugin
    return topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x1x8").devices


def compile_one(
    name: str, build: Callable[[Sequence[Any]], Any], chips: Sequence[Any], platform: str
) -> dict[str, Any]:
    """Compile one case; an error becomes its text, so that one run reports every case."""
    import jax

    from fnml.plan import collectives

    try:
        function, arguments = build(chips)
        traced = jax.jit(function).trace(*arguments)
        compiled = traced.lower(lowering_platforms=(platform,)).compile()
    except Exception as error:  # noqa: BLE001 - whatever the compiler says is the finding
        return {"case": name, "error": f"{type(error).__name__}: {error}"[:2000]}
    found = [[c.kind, c.count, c.bytes, c.group] for c in collectives(compiled.as_text())]
    return {"case": name, "devices": len(chips), "collectives": found}


if __name__ == "__main__":
    main(sys.argv[1])
