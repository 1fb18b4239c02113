"""Compile an exported step for chips that are not there.

Run as a file by another Python, which has the compiler and needs nothing but JAX beside it:
``python _worker.py FOLDER``. In the folder are ``request.json`` and ``step.bin``; ``result.json`` and
``program.txt`` are put there.
"""

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # No chip is used, so that another process may have it.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_MEMORY = ("argument", "output", "alias", "temp", "generated_code")


def environment(platform: str) -> dict[str, str]:
    """Return the variables under which a platform's compiler works without its hardware."""
    own = {"tpu": _TPU, "cuda": {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}}
    return {"JAX_PLATFORMS": "cpu", **own.get(platform, {})}


def devices(request: dict[str, Any]) -> list[Any]:
    """Return the chips that are asked for, in the order of the mesh."""
    import jax
    from jax.experimental import topologies

    shape, platform = request["shape"], request["platform"]
    sizes = tuple(request["mesh"].values())
    if platform == "cpu":
        return jax.devices("cpu")[: math.prod(sizes)]
    if platform == "tpu":
        name = f"{request['chip']}:{'x'.join(map(str, shape))}"
        # A host has 2 x 2 chips, or what there is of them.
        bounds = [2 - size % 2 for size in (*shape, 1, 1)[:2]] + [1]
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=name, chips_per_host_bounds=bounds
        ).devices
        from jax.experimental import mesh_utils

        try:
            return list(mesh_utils.create_device_mesh(sizes, found).flat)
        except NotImplementedError:
            split = mesh_utils.create_device_mesh(sizes, found, allow_split_physical_axes=True)
            return list(split.flat)
    from jax._src import xla_bridge

    xla_bridge.backends()  # registers the plugin
    with contextlib.suppress(ImportError):
        # Tells the compiler where the runtime of Pallas's kernels is.
        import jax.experimental.mosaic.gpu
    arranged = "1x" + "x".join(map(str, shape))
    target = request["compiler"]
    return list(
        topologies.get_topology_desc("", "cuda", target_config=target, topology=arranged).devices
    )


def compile_step(request: dict[str, Any], step: bytes) -> tuple[dict[str, Any], str]:
    """Compile; return what is known of the program, and its text."""
    import jax
    import numpy as np
    from jax import export

    started = time.perf_counter()
    exported = export.deserialize(bytearray(step))
    chips = devices(request)
    names, sizes = tuple(request["mesh"]), tuple(request["mesh"].values())
    auto = (jax.sharding.AxisType.Auto,) * len(names)
    grid = np.asarray(chips, dtype=object).reshape(sizes)
    mesh = jax.sharding.Mesh(grid, names, axis_types=auto)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=given or everywhere)
        for aval, given in zip(exported.in_avals, exported.in_shardings_jax(mesh), strict=True)
    ]
    results = [given or everywhere for given in exported.out_shardings_jax(mesh)]
    jitted = jax.jit(exported.call, donate_argnums=tuple(request["donated"]), out_shardings=results)
    lowered = jitted.trace(*arguments).lower(lowering_platforms=(request["platform"],))
    compiled = lowered.compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    result = {
        "memory": {name: getattr(memory, f"{name}_size_in_bytes") for name in _MEMORY},
        "cost": {name: (cost or {}).get(name) for name in ("flops", "bytes accessed")},
        "places": [place(chip, i, request) for i, chip in enumerate(chips)],
        "seconds": time.perf_counter() - started,
    }
    return result, compiled.as_text()


def place(chip: Any, index: int, request: dict[str, Any]) -> list[int]:
    """Say where a chip is: its coordinates in the torus, or its host and its number there."""
    if request["platform"] == "cuda":
        return list(divmod(index, request["shape"][-1]))
    return [int(x) for x in getattr(chip, "coords", (index,))]


def main(folder: Path) -> None:
    """Compile what lies in a folder."""
    request = json.loads((folder / "request.json").read_text())
    os.environ |= environment(request["platform"])
    if request["platform"] == "cpu":
        os.environ["JAX_NUM_CPU_DEVICES"] = str(math.prod(request["mesh"].values()))
    result: dict[str, Any]
    try:
        result, text = compile_step(request, (folder / "step.bin").read_bytes())
    except Exception as error:  # noqa: BLE001 - what the compiler says is the result
        result, text = {"error": f"{type(error).__name__}: {error}"}, ""
    (folder / "program.txt").write_text(text)
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
