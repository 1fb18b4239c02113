"""Weights under another program's names: a table of rules, read in both directions."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fnml.checkpoint._rearrange import Axes
from fnml.checkpoint._tree import Leaf, describe, named_leaves, place, to_host, too_wide
from fnml.core import CheckpointError, ConfigError, ShapeError, nearest

PyTree = Any

_FIELD = re.compile(r"\{(\*?)(\w+)\}")


class WeightRule(NamedTuple):
    """One line of a name table.

    ``{name}`` stands for one segment, the same on both sides; ``{*name}`` for any number of them,
    with dots on their side and slashes on ours. A ``{name}`` on their side only is a number from 0
    to n - 1: their n arrays are ours along a leading axis, in the order of the fields.

    Attributes:
      theirs: their name, such as ``blocks.{i}.attn.q_proj.weight``.
      ours: the path in the parameters, such as ``layers/attention/query``; ``None`` for what is
        left out on the way in.
      axes: how one of their arrays becomes one of ours, if not as it is: ``"out in -> in out"``,
        or with grouped axes ``"(heads k) d -> d heads k"``.
    """

    theirs: str
    ours: str | None
    axes: str | None = None


class _Source(NamedTuple):
    """Where one of our arrays comes from: their names in the order of the stack."""

    names: tuple[str, ...]
    stack: tuple[int, ...]
    axes: Axes | None


def import_weights(
    arrays: Mapping[str, Any],
    rules: Sequence[WeightRule],
    target: PyTree,
    *,
    cast: bool = False,
) -> PyTree:
    """Build parameters from arrays under another program's names.

    Args:
      arrays: their arrays by name, from :func:`load_torch`, :func:`load_safetensors` or
        :func:`load_npz`.
      rules: the table; for each path of ``target`` the first rule whose ``ours`` fits decides.
        Two paths may come from one name (tied weights).
      target: the parameters wanted, of arrays or :class:`jax.ShapeDtypeStruct`; leaves with a
        sharding are put onto it.
      cast: whether a floating dtype may become another floating dtype.

    Law: ``import_weights(export_weights(params, rules), rules, params)`` has the bits of
    ``params``.

    Raises:
      ConfigError: a rule is not well-formed.
      CheckpointError: names are missing or left over, or shapes or dtypes differ. All are listed,
        with the nearest names.

    >>> import jax.numpy as jnp
    >>> rules = [WeightRule("blocks.{i}.fc.weight", "layers/up", "out in -> in out")]
    >>> theirs = {f"blocks.{i}.fc.weight": np.full((3, 2), i, np.float32) for i in range(4)}
    >>> params = import_weights(theirs, rules, {"layers": {"up": jnp.zeros((4, 2, 3))}})
    >>> params["layers"]["up"][:, 0, 0].tolist()
    [0.0, 1.0, 2.0, 3.0]
    >>> export_weights(params, rules)["blocks.3.fc.weight"].shape
    (3, 2)
    """
    checked = _check(rules)
    leaves = named_leaves(target)
    wanted = describe(leaves)
    sources, faults = _sources({name: leaf.shape for name, leaf in wanted.items()}, checked)
    used = [name for source in sources.values() for name in source.names]
    skipped = [_pattern(rule.theirs) for rule, _ in checked if rule.ours is None]
    missing = sorted(set(used) - arrays.keys())
    extra = [
        name
        for name in sorted(arrays.keys() - set(used))
        if not any(pattern.match(name) for pattern in skipped)
    ]
    ours = {theirs: name for name, source in sources.items() for theirs in source.names}
    faults += [f"  {n}: missing, for {ours[n]}.{nearest(n, extra)}" for n in missing]
    faults += [f"  {n}: no path of the target takes it.{nearest(n, missing)}" for n in extra]
    built: dict[str, np.ndarray] = {}
    for name, source in sources.items():
        if not set(source.names) <= arrays.keys():
            continue
        wrong = [
            f"  {theirs}: {fault}"
            for theirs in source.names
            for fault in _faults(arrays[theirs], source, wanted[name], cast)
        ]
        faults += wrong
        if not wrong:
            built[name] = _stacked(arrays, source, wanted[name])
    faults = faults or too_wide(leaves)
    if faults:
        raise CheckpointError(
            "the weights do not fit the target by these rules:\n" + "\n".join(faults)
        )
    placed = [place(built[name], wanted[name], leaf) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(target), placed)


def export_weights(params: PyTree, rules: Sequence[WeightRule]) -> dict[str, np.ndarray]:
    """Return parameters under another program's names, for :func:`save_torch` and the others.

    Args:
      params: a tree of arrays.
      rules: the table of :func:`import_weights`.

    Returns:
      NumPy arrays by their name.

    Raises:
      ConfigError: a rule is not well-formed.
      ShapeError: a path has no rule, two would have one name, or a shape does not fit the axes;
        all are listed.
    """
    leaves = named_leaves(params)
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    sources, faults = _sources(shapes, _check(rules))
    host = to_host(leaves, {})
    found: dict[str, np.ndarray] = {}
    for name, source in sources.items():
        pieces = host[name].reshape(len(source.names), *shapes[name][len(source.stack) :])
        for theirs, piece in zip(source.names, pieces, strict=True):
            if theirs in found:
                faults.append(f"  {name}: {theirs} is also the name of another array")
            elif source.axes is None:
                found[theirs] = piece
            else:
                try:
                    found[theirs] = np.ascontiguousarray(source.axes.back(piece))
                except ValueError as error:
                    faults.append(f"  {name}: {error}")
    if faults:
        raise ShapeError("the parameters cannot be named by these rules:\n" + "\n".join(faults))
    return found


def _check(rules: Sequence[WeightRule]) -> list[tuple[WeightRule, Axes | None]]:
    """Parse the axes and compare the fields of every rule."""
    faults, checked = [], []
    for rule in rules:
        theirs = _FIELD.findall(rule.theirs)
        ours = _FIELD.findall(rule.ours or "")
        if len(set(theirs)) < len(theirs) or len(set(ours)) < len(ours):
            faults.append(f"  {rule}: a field stands twice on one side")
        if unknown := sorted({name for _, name in set(ours) - set(theirs)}):
            faults.append(f"  {rule}: nothing in theirs says what {unknown} are")
        if rule.ours is not None and any(star for star, _ in set(theirs) - set(ours)):
            faults.append(f"  {rule}: a {{*field}} cannot be stacked")
        try:
            axes = None if rule.axes is None else Axes.parse(rule.axes)
        except ValueError as error:
            faults.append(f"  {rule}: {error}")
        else:
            checked.append((rule, axes))
    if faults:
        raise ConfigError("the table of names is wrong:\n" + "\n".join(faults))
    return checked


def _pattern(template: str) -> re.Pattern[str]:
    parts, at = [], 0
    for field in _FIELD.finditer(template):
        parts.append(re.escape(template[at : field.start()]))
        parts.append(f"(?P<{field[2]}>{'.+' if field[1] else '[^./]+'})")
        at = field.end()
    return re.compile("".join(parts) + re.escape(template[at:]) + r"\Z", re.DOTALL)


def _sources(
    shapes: Mapping[str, tuple[int, ...]], rules: Sequence[tuple[WeightRule, Axes | None]]
) -> tuple[dict[str, _Source], list[str]]:
    """Say for each of our paths which of their names it is made of."""
    sources, faults = {}, []
    patterns = [(_pattern(rule.ours), rule, axes) for rule, axes in rules if rule.ours is not None]
    for name, shape in shapes.items():
        fits = ((p.match(name), rule, axes) for p, rule, axes in patterns)
        match, rule, axes = next((fit for fit in fits if fit[0]), (None, None, None))
        if match is None or rule is None:
            near = nearest(name, [str(rule.ours) for _, rule, _ in patterns])
            faults.append(f"  {name}: no rule makes this path.{near}")
            continue
        fields = match.groupdict()
        stacked = [field for _, field in _FIELD.findall(rule.theirs) if field not in fields]
        if len(stacked) > len(shape):
            faults.append(f"  {name}: has shape {shape}, and {stacked} have to be leading axes")
            continue
        stack = shape[: len(stacked)]
        names = tuple(_names(rule.theirs, fields, stacked, stack))
        sources[name] = _Source(names, stack, axes)
    return sources, faults


def _names(
    theirs: str, fields: Mapping[str, str], stacked: Sequence[str], stack: Sequence[int]
) -> Iterator[str]:
    for index in itertools.product(*map(range, stack)):
        values = {**fields, **dict(zip(stacked, map(str, index), strict=True))}

        def fill(field: re.Match[str], values: Mapping[str, str] = values) -> str:
            value = values[field[2]]
            return value.replace("/", ".") if field[1] else value

        yield _FIELD.sub(fill, theirs)


def _faults(array: Any, source: _Source, wanted: Leaf, cast: bool) -> list[str]:
    """List why one of their arrays is not a part of ours."""
    faults = []
    shape = wanted.shape[len(source.stack) :]
    if source.axes is not None:
        try:
            source.axes.sizes(array.shape, shape)
        except ValueError as error:
            faults.append(str(error))
    elif array.shape != shape:
        turned = array.shape == shape[::-1] and len(shape) == 2
        hint = "; axes='a b -> b a' would turn it" if turned else ""
        faults.append(f"has shape {array.shape}, expected {shape}{hint}")
    if str(array.dtype) != wanted.dtype:
        floats = all(
            not dtype.startswith("key<")
            and jax.numpy.issubdtype(jax.numpy.dtype(dtype), np.floating)
            for dtype in (str(array.dtype), wanted.dtype)
        )
        if not (floats and cast):
            hint = "; cast=True would round it" if floats else ""
            faults.append(f"has dtype {array.dtype}, expected {wanted.dtype}{hint}")
    return faults


def _stacked(arrays: Mapping[str, Any], source: _Source, wanted: Leaf) -> np.ndarray:
    shape = wanted.shape[len(source.stack) :]
    result = np.empty((len(source.names), *shape), jax.numpy.dtype(wanted.dtype))
    for row, name in zip(result, source.names, strict=True):
        array = np.asarray(arrays[name])
        piece = array if source.axes is None else source.axes.there(array, shape)
        row[...] = piece.astype(result.dtype)
    return result.reshape(wanted.shape)
