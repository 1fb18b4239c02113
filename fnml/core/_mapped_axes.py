"""What a function that maps itself over mesh axes has to know about them."""

from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

from fnml.core._errors import LayoutError, nearest

Axes = str | Sequence[str] | None


def axis_tuple(axes: Axes) -> tuple[str, ...]:
    """Return the mesh axes that an entry of a rule or of a ``PartitionSpec`` names.

    >>> axis_tuple(None), axis_tuple("data"), axis_tuple(["data", "model"])
    ((), ('data',), ('data', 'model'))
    """
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def mapped_axes(what: str, mesh: Mesh, roles: Mapping[str, Axes]) -> tuple[str, ...]:
    """Return the mesh axes that ``what`` maps itself over, each once.

    Args:
      what: who asks, for messages.
      mesh: the device mesh.
      roles: the mesh axes by the argument that named them.

    Raises:
      LayoutError: the mesh lacks an axis, or one is named twice; all faults are listed.

    >>> mesh = jax.make_mesh((1, 1), ("data", "stage"), axis_types=(AxisType.Auto,) * 2)
    >>> mapped_axes("pipeline", mesh, {"axis": "stage", "batch": "data"})
    ('stage', 'data')
    """
    faults, used = [], dict[str, str]()
    for role, axes in roles.items():
        for axis in axis_tuple(axes):
            if axis not in mesh.shape:
                faults.append(
                    f"{role}={axis!r}: the mesh has the axes {tuple(mesh.shape)}."
                    f"{nearest(axis, map(str, mesh.shape))}"
                )
            elif axis in used:
                faults.append(f"{role}={axis!r}: {used[axis]} has this axis already")
            used.setdefault(axis, role)
    if faults:
        raise LayoutError(f"{what}: " + "; ".join(faults))
    return tuple(used)


def refuse_mapped(what: str, cure: str) -> None:
    """Refuse to be traced inside ``shard_map`` or ``pmap``.

    Raises:
      LayoutError: the caller is mapped over devices already; the message ends in ``cure``.

    >>> refuse_mapped("pipeline", "...")
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    mapped = tuple(name for name, kind in kinds if kind == AxisType.Manual)
    if mapped:
        raise LayoutError(
            f"{what} maps itself over devices, and is called inside a shard_map or pmap over "
            f"{mapped} (data_parallel and pmap are such): {cure}"
        )


def divided() -> bool:
    """Tell whether the compiler is to divide what is being traced over devices.

    That is: a mesh is set (``jax.set_mesh``, :func:`fnml.transforms.shard`) with an axis of several
    devices that no ``shard_map`` around has divided by.

    >>> divided()
    False
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return any(size > 1 and kind != AxisType.Manual for size, kind in kinds)
