"""Arrange devices along named axes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from fnml.core._errors import ConfigError, LayoutError
from fnml.core._mapped_axes import axis_tuple

_REST = -1


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange devices along named axes, the last of which changes fastest.

    The devices of one host follow each other, so the axis that talks most (``"model"``) belongs
    last. All axes are of JAX's type ``Auto``: arrays are placed by shardings and the compiler
    does the rest. ``jax.make_mesh`` by itself makes ``Explicit`` ones, under which an ordinary
    ``table[tokens]`` is an error.

    Args:
      axes: the size of each axis, in order; one of them may be -1 for all devices that are left.
      devices: by default ``jax.devices()``; those of a ``jax.experimental.topologies``
        description too. All of them are used: pass ``jax.devices()[:n]`` to leave some idle.

    Raises:
      LayoutError: the sizes do not multiply to the number of devices, or are none.

    >>> import jax
    >>> dict(make_mesh({"data": -1, "model": 1}, jax.devices()[:1]).shape)
    {'data': 1, 'model': 1}
    """
    found = list(jax.devices() if devices is None else devices)
    sizes = _sizes(axes, len(found))
    shape, auto = tuple(sizes.values()), (AxisType.Auto,) * len(sizes)
    if found[0].platform != "tpu":
        return Mesh(np.asarray(found, dtype=object).reshape(shape), tuple(sizes), axis_types=auto)
    try:
        return jax.make_mesh(shape, tuple(sizes), axis_types=auto, devices=found)
    except NotImplementedError:
        # No axis is a product of whole physical axes; parts of one have to do.
        from jax.experimental import mesh_utils

        split = mesh_utils.create_device_mesh(shape, found, allow_split_physical_axes=True)
        return Mesh(split, tuple(sizes), axis_types=auto)


def _sizes(axes: Mapping[str, int], count: int) -> dict[str, int]:
    """Put a number in the place of -1, and refuse what does not come to ``count`` devices."""
    sizes = {str(name): int(size) for name, size in axes.items()}
    asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
    rest = [name for name, size in sizes.items() if size == _REST]
    if not sizes or not count:
        raise LayoutError(f"a mesh needs an axis and a device, got the axes ({asked}), {count=}")
    if any(size < 1 for size in sizes.values() if size != _REST) or len(rest) > 1:
        raise LayoutError(
            f"the mesh ({asked}): expected sizes of at least 1, and -1 at most once, for the rest"
        )
    given = math.prod(size for size in sizes.values() if size != _REST)
    if rest and count % given == 0:
        return sizes | {rest[0]: count // given}
    if not rest and given == count:
        return sizes
    fine = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
    if rest:
        raise LayoutError(
            f"the mesh ({asked}): {given} does not divide the {count} devices there are, so nothing "
            f"is left for {rest[0]!r}; the other axes may come to {fine}"
        )
    idle = "; pass devices=jax.devices()[:n] to leave the rest idle" if given < count else ""
    raise LayoutError(
        f"the mesh ({asked}) is of {given} devices and there are {count}: sizes of {fine} divide "
        f"them, and -1 stands for the rest{idle}"
    )


def constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Say where an array and its gradient lie, for the compiler that divides the program.

    The mesh is the one that is set while tracing (``jax.set_mesh``, or
    :func:`fnml.transforms.shard`); without one nothing is done. Axes that it does not have count as
    axes of size 1, so a model may name more than one mesh has; those that a ``jax.shard_map`` around
    has divided by already are left out.

    Law: the identity.

    Raises:
      LayoutError: ``spec`` has more entries than the array has dimensions.

    >>> import jax.numpy as jnp
    >>> constrain(jnp.arange(3), PartitionSpec("data")).tolist()
    [0, 1, 2]
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if len(spec) > x.ndim:
        raise LayoutError(
            f"an array of shape {x.shape} cannot lie as {spec}: expected at most {x.ndim} entries"
        )
    free = [
        tuple(axis for axis in axis_tuple(entry) if kinds.get(axis) == AxisType.Auto)
        for entry in spec
    ]
    if not any(free):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(axes or None for axes in free)))


def parse_mesh(text: str) -> dict[str, int]:
    """Read the axes of a mesh, as written in a configuration or on a command line.

    Raises:
      ConfigError: the text is no list of ``name=size``, or has a name twice.

    >>> parse_mesh("data=2,model=4")
    {'data': 2, 'model': 4}
    >>> parse_mesh("")
    {}
    """
    axes: dict[str, int] = {}
    faults = []
    for part in (piece.strip() for piece in text.split(",") if text.strip()):
        name, equals, size = (piece.strip() for piece in part.partition("="))
        number = size.removeprefix("-")
        if not (equals and name.isidentifier() and number.isdecimal()):
            faults.append(f"{part!r} is no axis=size")
        elif int(size) < 1 and int(size) != _REST:
            faults.append(f"{part!r}: expected a size of at least 1, or -1 for the rest")
        elif name in axes:
            faults.append(f"{name!r} is there twice")
        else:
            axes[name] = int(size)
    if list(axes.values()).count(_REST) > 1:
        faults.append("-1 can be the rest only once")
    if faults:
        raise ConfigError(
            f"mesh={text!r}: {'; '.join(faults)}; expected axes and sizes such as data=2,model=4"
        )
    return axes
