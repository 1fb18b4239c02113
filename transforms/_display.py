"""Show arrays and trees without flooding the terminal."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnml.core import ConfigError, is_param, leaf_names, require
from fnml.transforms._capture import Stats, array_stats

PyTree = Any
_DEFAULT = 12


def format_array(x: Any, limit: int) -> str:
    """Return an array's dtype, shape, range and at most ``limit`` of its elements.

    >>> format_array(np.arange(1000.0, dtype=np.float32), 4)
    'float32[1000] in [0, 999], mean 499.5: 0, 1, 2, 3, ...'
    """
    if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return f"key{list(x.shape)} {jax.random.key_impl(x)}"
    x = np.asarray(x)
    head = f"{x.dtype.name}[{','.join(map(str, x.shape))}]"
    if not x.size:
        return head
    shown = ", ".join(f"{v:.4g}" for v in x.ravel()[:limit].astype(np.float64).tolist())
    more = ", ..." if x.size > limit else ""
    if x.ndim == 0:
        return f"{head}: {shown}"
    wide = x.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    faults = f", {x.size - finite.size} not finite" if finite.size < x.size else ""
    span = f"in [{finite.min():.4g}, {finite.max():.4g}], mean {finite.mean():.4g}"
    return f"{head} {span if finite.size else ''}{faults}: {shown}{more}"


def show(tree: PyTree, limit: int | None = None) -> None:
    """Print every leaf of a tree on a line of its own: path, dtype, shape, range, first elements.

    Args:
      tree: arrays, or a tree of them.
      limit: the most elements of a leaf; by default the environment's ``FNML_DISPLAY_MAX``, or
        12. Printing is the edge of the program: nothing else reads that variable.

    Raises:
      ConfigError: ``FNML_DISPLAY_MAX`` is no whole number of at least 0.

    >>> show({"w": jnp.arange(6.0).reshape(2, 3)}, limit=2)
    w  float32[2,3] in [0, 5], mean 2.5: 0, 1, ...
    """
    if limit is None:
        text = os.environ.get("FNML_DISPLAY_MAX", str(_DEFAULT))
        if not text.isdecimal():
            raise ConfigError(f"FNML_DISPLAY_MAX={text!r}: expected a whole number, such as 12")
        limit = int(text)
    names = leaf_names(tree)
    width = max((len(name) for name in names), default=0)
    for name, leaf in zip(names, jax.tree.leaves(tree), strict=True):
        print(f"{name:<{width}}  {format_array(leaf, limit)}".lstrip())


@dataclass(frozen=True)
class ParamRow:
    """One line of a parameter table.

    Attributes:
      path, shape, dtype, count: of the leaf.
      axes: its logical axis names; empty if only arrays were given.
      norm: its Euclidean norm; ``None`` for a spec.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    count: int
    norm: float | None


def param_rows(spec_or_params: PyTree, params: PyTree | None = None) -> list[ParamRow]:
    """List the parameters of a spec, of an array tree, or of both together.

    >>> from fnml.core import Param
    >>> spec = {"w": Param((2, 3), ("embed", "mlp"), jax.nn.initializers.ones)}
    >>> param_rows(spec)
    [ParamRow(path='w', shape=(2, 3), dtype='float32', axes=('embed', 'mlp'), count=6, norm=None)]
    """
    names, leaves = leaf_names(spec_or_params), jax.tree.leaves(spec_or_params)
    arrays = [None if is_param(x) else x for x in leaves]
    if params is not None:
        if leaf_names(params) != names:
            raise ConfigError("the params have other paths than the spec")
        arrays = jax.tree.leaves(params)
    return [
        ParamRow(
            path,
            tuple(leaf.shape),
            jnp.dtype(leaf.dtype).name,
            leaf.axes if is_param(leaf) else (),
            int(leaf.size),
            None if x is None else float(np.linalg.norm(np.asarray(x, np.float64))),
        )
        for path, leaf, x in zip(names, leaves, arrays, strict=True)
    ]


def param_table(spec_or_params: PyTree, params: PyTree | None = None) -> Any:
    """Return :func:`param_rows` as a ``rich`` table with the total, to be printed by rich."""
    from rich.table import Table

    rows = param_rows(spec_or_params, params)
    table = Table("path", "shape", "dtype", "axes", "count", "norm")
    for row in rows:
        axes = ", ".join(axis or "-" for axis in row.axes)
        norm = "" if row.norm is None else f"{row.norm:.4g}"
        table.add_row(row.path, str(list(row.shape)), row.dtype, axes, f"{row.count:,}", norm)
    table.add_row("total", "", "", "", f"{sum(row.count for row in rows):,}", "")
    return table


def histogram_values(captured: dict[str, Any]) -> dict[str, float]:
    """Turn captured arrays or :class:`Stats` into scalars by name, for ``fnml.core.Row.values``.

    Each value gives ``name/mean``, ``/std``, ``/min``, ``/max``, ``/zeros`` and ``/nonfinite``;
    inside a scan one set per layer: ``name/0/mean``.

    >>> sorted(histogram_values({"h": jnp.zeros(3)}))[:2]
    ['h/max', 'h/mean']
    """
    found: dict[str, float] = {}
    for name, stats in _each(captured):
        fields = ("mean", "std", "min", "max", "zeros", "nonfinite")
        found |= {f"{name}/{field}": float(getattr(stats, field)) for field in fields}
    return found


def plot_histograms(captured: dict[str, Any], path: Path | str | None = None) -> Any:
    """Draw a histogram of each captured value (extra ``notebooks``); return matplotlib's figure.

    Args:
      captured: what :func:`capture` handed out: arrays, or :class:`Stats`.
      path: where to save the picture; by default it is only returned.

    Raises:
      MissingExtraError: matplotlib is not installed.
      ConfigError: there is nothing to draw.
    """
    figure_of = require("matplotlib.figure", extra="notebooks").Figure
    drawn = list(_each(captured))
    if not drawn:
        raise ConfigError("nothing was captured, so there is nothing to draw")
    columns = min(4, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = figure_of(figsize=(3 * columns, 2 * rows), layout="constrained")
    for axes, (name, stats) in zip(
        figure.subplots(rows, columns, squeeze=False).flat, drawn, strict=False
    ):
        axes.stairs(np.asarray(stats.counts), np.nan_to_num(np.asarray(stats.edges)), fill=True)
        axes.set_title(f"{name[-32:]}\nmean {float(stats.mean):.3g}, std {float(stats.std):.3g}")
        axes.title.set_fontsize(8)
    if path is not None:
        figure.savefig(path)
    return figure


def _each(captured: dict[str, Any]) -> list[tuple[str, Stats]]:
    found: list[tuple[str, Stats]] = []
    for name, value in captured.items():
        stats = value if isinstance(value, Stats) else array_stats(jnp.asarray(value))
        stats = jax.tree.map(np.asarray, stats)
        if stats.mean.ndim == 0:
            found.append((name, stats))
            continue
        for index in np.ndindex(stats.mean.shape):
            one = Stats(*(field[index] for field in stats))
            found.append((f"{name}/{'/'.join(map(str, index))}", one))
    return found
