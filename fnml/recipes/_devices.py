"""The devices that a run is laid out on."""

import contextlib

import jax

from fnml.core import ConfigError


def provide(count: int) -> None:
    """See to it that there are ``count`` devices: a CPU is divided into as many.

    Raises:
      ConfigError: there are fewer.
    """
    if count == 1:
        return
    # Once JAX has started, its devices are what they are.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if len(devices) < count:
        raise ConfigError(
            f"devices={count}: there are {len(devices)} ({devices[0].device_kind}) here; give "
            "--devices another number, the bits are the same"
        )


def mesh(count: int) -> jax.sharding.Mesh | None:
    """Return a mesh of the first ``count`` devices with the axis ``data``; ``None`` for one."""
    if count == 1:
        return None
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((count,), ("data",), axis_types=auto, devices=jax.devices()[:count])
