"""The devices that a run is laid out on."""

import contextlib
import math
from typing import Any

import jax

from fnml.core import ConfigError, axis_tuple, make_mesh, parse_mesh
from fnml.parallel import parse_rules

BATCH_AXES = ("data", "expert")
"""The mesh axes that a batch is divided along, where a mesh has them."""


def layout_faults(mesh: str, rules: str, batch_size: int) -> list[str]:
    """Say what is wrong with ``--mesh`` and ``--rules``."""
    try:
        axes, sets = parse_mesh(mesh), parse_rules(rules)
    except ConfigError as error:
        return [str(error)]
    used = {axis for rule in sets.values() for axis in axis_tuple(rule)}
    faults = []
    if missing := sorted(used - set(axes)):
        faults.append(
            f"rules={rules!r} divide along {missing}, which mesh={mesh!r} does not have: add "
            + ", ".join(f"{axis}=2" for axis in missing)
        )
    if idle := sorted(set(axes) - used - {"data"}):
        faults.append(
            f"mesh={mesh!r}: nothing is divided along {idle}; the batch is along data, parameters "
            "as --rules say (tensor: model, expert: expert, fsdp: data)"
        )
    ways = math.prod(axes.get(axis, 1) for axis in BATCH_AXES)
    if ways > 0 and batch_size % ways:
        faults.append(
            f"mesh={mesh!r} divides a batch over {ways} devices: expected a multiple, got "
            f"{batch_size} examples at once"
        )
    return faults


def device_count(run: Any) -> int:
    """Return how many devices a run asks for; 0 for all that there are."""
    axes = parse_mesh(run.mesh)
    return max(math.prod(axes.values()), 0) if axes else run.devices


def compiled_mesh(run: Any) -> jax.sharding.Mesh | None:
    """Return the mesh that the compiler divides a run's step over; ``None`` without ``--mesh``.

    Raises:
      ConfigError: several processes share the run.
      LayoutError: there are fewer devices than the mesh has.
    """
    axes = parse_mesh(run.mesh)
    if not axes:
        return None
    if jax.process_count() > 1:
        raise ConfigError(
            f"mesh={run.mesh!r}: {jax.process_count()} processes share this run, and a recipe divides "
            "by --mesh in one process: use --devices, or fnml.transforms.shard in code"
        )
    devices = jax.devices()
    return make_mesh(axes, devices[: device_count(run) or len(devices)])


def batch_spec(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> jax.P:
    """Return how a batch lies on a mesh."""
    return jax.P(tuple(axis for axis in BATCH_AXES if axis in mesh.shape) or None)


def provide(count: int) -> None:
    """See to it that there are ``count`` devices: a CPU is divided into as many.

    Raises:
      ConfigError: there are fewer.
    """
    if count <= 1:
        return
    # Once JAX has started, its devices are what they are.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if len(devices) < count:
        raise ConfigError(
            f"devices={count}: there are {len(devices)} ({devices[0].device_kind}) here; give "
            "--devices another number, the bits are the same, or --mesh other sizes"
        )


def mesh(count: int) -> jax.sharding.Mesh | None:
    """Return a mesh of the first ``count`` devices with the axis ``data``; ``None`` for one."""
    if count == 1:
        return None
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((count,), ("data",), axis_types=auto, devices=jax.devices()[:count])
