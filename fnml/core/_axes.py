"""Turn logical axis names into shardings on a mesh."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from fnml.core._errors import LayoutError, nearest
from fnml.core._mapped_axes import axis_tuple
from fnml.core._param import Param
from fnml.core._paths import map_with_name

PyTree = Any
Rules = Mapping[str, str | Sequence[str] | None]


def shardings(spec: PyTree, mesh: Mesh | AbstractMesh, rules: Rules) -> PyTree:
    """Return a sharding for each :class:`fnml.Param`, by rules on its logical axis names.

    Args:
      spec: a tree of Param.
      mesh: the device mesh, or what it will be.
      rules: logical axis name -> mesh axis, several mesh axes, or ``None``; names without a
        rule are replicated.

    Raises:
      LayoutError: a rule names a mesh axis that is not there, a mesh axis would be used twice
        in one array, or does not divide its dimension. All offending parameters are listed.

    >>> import jax
    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> spec = {"w": Param((4, 2), ("embed", "mlp"), jax.nn.initializers.zeros)}
    >>> shardings(spec, mesh, {"embed": "data"})["w"].spec
    P('data', None)
    """
    sizes = dict(mesh.shape)
    faults = [
        f"the rule {name!r} -> {axis!r}: the mesh has the axes {tuple(sizes)}."
        f"{nearest(axis, sizes)}"
        for name, rule in rules.items()
        for axis in axis_tuple(rule)
        if axis not in sizes
    ]
    if faults:
        raise LayoutError("\n".join(faults))

    def one(path: str, param: Param) -> NamedSharding:
        before = len(faults)
        entries: list[str | tuple[str, ...] | None] = []
        used: dict[str, str | None] = {}
        for size, name in zip(param.shape, param.axes, strict=True):
            axes = axis_tuple(rules.get(name)) if name is not None else ()
            for axis in axes:
                if axis in used:
                    faults.append(
                        f"{path}: the mesh axis {axis!r} would shard both {used[axis]!r} and "
                        f"{name!r} of {param.axes}"
                    )
                used[axis] = name
            ways = math.prod(sizes[axis] for axis in axes)
            if size % ways:
                faults.append(
                    f"{path}: dimension {name!r} has size {size}, which {ways} devices along "
                    f"{axes} do not divide"
                )
            entries.append(None if not axes else axes[0] if len(axes) == 1 else axes)
        # JAX refuses a faulty spec on sight; the error below lists all faults instead.
        return NamedSharding(mesh, PartitionSpec(*entries if len(faults) == before else ()))

    result = map_with_name(one, spec)
    if faults:
        raise LayoutError("these parameters cannot be laid out:\n" + "\n".join(faults))
    return result
