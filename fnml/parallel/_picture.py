"""Pictures of where arrays lie: text for a terminal, HTML for a notebook."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding

from fnml.core import LayoutError, ShapeError, axis_tuple, leaf_names

PyTree = Any
_MOST_LABELLED = 64
_HEADS = ("array", "shape", "axes", "divided by", "on a device", "bytes there", "copies")


class Placed(NamedTuple):
    """Where one array lies.

    Attributes:
      name: its path.
      shape: the whole array's.
      axes: the names of its dimensions, where it is a :class:`fnml.Param`.
      sharding: which mesh axes divide which dimension.
      local: the shape that a device holds.
      nbytes: the bytes that a device holds.
      copies: how many devices hold the same part.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    sharding: NamedSharding
    local: tuple[int, ...]
    nbytes: int
    copies: int

    @property
    def parts(self) -> tuple[int, ...]:
        """Into how many parts each dimension is divided."""
        return tuple(
            size // part if part else 1 for size, part in zip(self.shape, self.local, strict=True)
        )


class Picture(str):
    """A table of arrays as text, which a notebook shows with a drawing of each.

    Attributes:
      rows: the arrays.
    """

    rows: tuple[Placed, ...]

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{head}</th>" for head in (*_HEADS, ""))
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in _cells(row))}"
            f"<td>{_drawing(row)}</td></tr>"
            for row in self.rows
        )
        summary = html.escape("\n".join(_summary(self.rows))).replace("\n", "<br>")
        return f"<p>{summary}</p><table><tr>{head}</tr>{body}</table>"


def picture(tree: PyTree, shardings: PyTree | None = None) -> Picture:
    """Say of every array which mesh axes divide it, and what one device holds.

    Args:
      tree: arrays, :class:`jax.ShapeDtypeStruct` or :class:`fnml.Param`.
      shardings: a tree like it; by default each leaf's own ``sharding``.

    Returns:
      a string, one line for each array; in a notebook a table, in which each array is drawn with
      its parts and the numbers of the devices that hold them.

    Raises:
      LayoutError: an array has no ``NamedSharding``; all of them are listed.
      ShapeError: ``shardings`` is another tree, or ``tree`` is empty.

    >>> from fnml.core import make_mesh
    >>> mesh = make_mesh({"data": 1}, jax.devices()[:1])
    >>> where = NamedSharding(mesh, jax.P("data", None))
    >>> print(picture({"w": jax.ShapeDtypeStruct((8, 2), "float32", sharding=where)}))
    mesh data=1 of 1 cpu
    array  shape  axes  divided by  on a device  bytes there  copies
    w      8x2          data, -     8x2                 64 B       1
    64 B in all, 64 B on a device
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        raise ShapeError("picture got a tree without arrays")
    wheres: list[Any]
    if shardings is None:
        wheres = [getattr(leaf, "sharding", None) for leaf in leaves]
    elif jax.tree.structure(tree) == jax.tree.structure(shardings):  # type: ignore[operator]
        wheres = jax.tree.leaves(shardings)
    else:
        raise ShapeError(
            f"picture got shardings {jax.tree.structure(shardings)} for arrays "
            f"{jax.tree.structure(tree)}: expected a sharding for each array"
        )
    names = leaf_names(tree)
    bare = [
        f"{name}: {type(where).__name__}"
        for name, where in zip(names, wheres, strict=True)
        if not isinstance(where, NamedSharding)
    ]
    if bare:
        raise LayoutError(
            f"picture takes arrays with a NamedSharding, got {', '.join(bare)}: give shardings=, or "
            "put them on a mesh"
        )
    rows = tuple(
        _placed(name, leaf, where) for name, leaf, where in zip(names, leaves, wheres, strict=True)
    )
    cells = [_HEADS, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_HEADS))]
    lines = [
        "  ".join(
            cell.rjust(width) if i >= len(_HEADS) - 2 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    first, last = _summary(rows)
    drawn = Picture("\n".join([first, *lines, last]))
    drawn.rows = rows
    return drawn


def _placed(name: str, leaf: Any, where: NamedSharding) -> Placed:
    shape = tuple(leaf.shape)
    local = where.shard_shape(shape)
    dtype = leaf.dtype
    if not jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        dtype = jnp.dtype(dtype)
    size = math.prod(local) * dtype.itemsize
    copies = where.mesh.size * math.prod(local) // max(math.prod(shape), 1)
    return Placed(name, shape, getattr(leaf, "axes", ()), where, local, size, max(copies, 1))


def _divided(row: Placed) -> list[str]:
    """Return for each dimension the mesh axes that divide it, and ``-`` for none."""
    entries = (*row.sharding.spec, *[None] * (len(row.shape) - len(row.sharding.spec)))
    return ["*".join(axis_tuple(entry)) or "-" for entry in entries]


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes)) or "()"


def _cells(row: Placed) -> tuple[str, ...]:
    return (
        row.name,
        _times(row.shape),
        ", ".join(axis or "-" for axis in row.axes),
        ", ".join(_divided(row)),
        _times(row.local),
        _bytes(row.nbytes),
        str(row.copies),
    )


def _summary(rows: Sequence[Placed]) -> tuple[str, str]:
    """Return a line about the mesh and one about the bytes."""
    mesh = rows[0].sharding.mesh
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    # A mesh for devices that are not there (fnml plan) has none to ask.
    kind = "devices" if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0].device_kind
    whole = sum(row.nbytes * math.prod(row.parts) for row in rows)
    each = sum(row.nbytes for row in rows)
    return (
        f"mesh {axes} of {mesh.size} {kind}",
        f"{_bytes(whole)} in all, {_bytes(each)} on a device",
    )


def _bytes(count: int) -> str:
    """Write a number of bytes with three digits."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1000:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"


def _drawing(row: Placed, width: int = 150, height: int = 80) -> str:
    """Draw an array as a box, cut along its two most divided dimensions, a colour for each part."""
    divided = [i for i, parts in enumerate(row.parts) if parts > 1][:2]
    across = next(
        (i for i in reversed(divided) if i == len(row.shape) - 1 or len(divided) > 1), None
    )
    down = next((i for i in divided if i != across), None)
    columns, lines = (1 if i is None else row.parts[i] for i in (across, down))
    holders = _holders(row, down, across) if columns * lines <= _MOST_LABELLED else {}
    w, h = width / columns, height / lines
    boxes = []
    for y in range(lines):
        for x in range(columns):
            hue = 360 * (y * columns + x) // (lines * columns)
            label = ",".join(map(str, holders.get((y, x), ())))
            boxes.append(
                f'<rect x="{x * w:.1f}" y="{y * h:.1f}" width="{w:.1f}" height="{h:.1f}" '
                f'fill="hsl({hue},60%,80%)" stroke="#555"/>'
                f'<text x="{(x + 0.5) * w:.1f}" y="{(y + 0.5) * h + 3:.1f}" font-size="9" '
                f'text-anchor="middle">{label}</text>'
            )
    return f'<svg width="{width}" height="{height}">{"".join(boxes)}</svg>'


def _holders(row: Placed, down: int | None, across: int | None) -> dict[tuple[int, int], list[int]]:
    """Return the numbers of the devices that hold each box of the drawing."""
    found: dict[tuple[int, int], list[int]] = {}
    places: Mapping[Any, Any] = row.sharding.devices_indices_map(row.shape)
    for device, index in places.items():
        at = tuple(
            0 if i is None else (index[i].start or 0) // row.local[i] for i in (down, across)
        )
        found.setdefault((at[0], at[1]), []).append(device.id)
    return {at: sorted(devices) for at, devices in found.items()}
