"""Hand out what a function computes on its way, by name."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex_core

from fnml.core import ConfigError, matches, nearest
from fnml.transforms._sites import Named, named
from fnml.transforms._walk import Rules, Seen, Site, trace, walk

PyTree = Any


class Stats(NamedTuple):
    """What an array's values look like; taken over its finite elements, in float32.

    Attributes:
      mean, std, min, max: float32 scalars; NaN if nothing is finite.
      zeros: the share of elements that are exactly 0.
      nonfinite: how many elements are NaN or infinite, int32.
      counts: a histogram of the finite elements, int32 ``[bins]``.
      edges: its edges, float32 ``[bins + 1]``, from ``min`` to ``max``.

    Inside a scan of length L each has a leading axis ``[L]``.
    """

    mean: jax.Array
    std: jax.Array
    min: jax.Array
    max: jax.Array
    zeros: jax.Array
    nonfinite: jax.Array
    counts: jax.Array
    edges: jax.Array


def array_stats(x: jax.Array, bins: int = 32) -> Stats:
    """Describe an array's values.

    >>> stats = array_stats(jnp.array([0.0, 1.0, 2.0, jnp.nan]), bins=2)
    >>> float(stats.mean), float(stats.zeros), int(stats.nonfinite), stats.counts.tolist()
    (1.0, 0.25, 1, [1, 2])
    """
    x = jnp.ravel(x).astype(jnp.float32)
    finite = jnp.isfinite(x)
    count = jnp.sum(finite, dtype=jnp.float32)
    kept = jnp.where(finite, x, jnp.zeros_like(x))
    low = jnp.min(jnp.where(finite, x, jnp.full_like(x, jnp.inf)), initial=jnp.inf)
    high = jnp.max(jnp.where(finite, x, jnp.full_like(x, -jnp.inf)), initial=-jnp.inf)
    some = count > 0
    low, high = (jnp.where(some, v, jnp.float32(jnp.nan)) for v in (low, high))
    mean = jnp.sum(kept) / count
    away = jnp.where(finite, x - mean, jnp.zeros_like(x))
    steps = jnp.arange(bins + 1, dtype=jnp.float32) / bins
    width = jnp.where(high > low, high - low, jnp.ones_like(low))
    place = jnp.clip(jnp.nan_to_num((kept - low) / width) * bins, 0, bins - 1).astype(jnp.int32)
    return Stats(
        mean=mean,
        std=jnp.sqrt(jnp.sum(away * away) / count),
        min=low,
        max=high,
        zeros=jnp.mean(x == 0, dtype=jnp.float32),
        nonfinite=jnp.sum(~finite, dtype=jnp.int32),
        counts=jnp.zeros(bins, jnp.int32).at[place].add(finite.astype(jnp.int32)),
        edges=low + steps * (high - low),
    )


def captured_names(
    function: Callable[..., PyTree], *args: Any, **options: Any
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the names that :func:`capture` knows, with shapes and dtypes where they are computed.

    >>> def layer(x):
    ...     return jnp.tanh(2 * x)
    >>> captured_names(lambda x: 1 + layer(x), jnp.ones(3))
    {'layer': ShapeDtypeStruct(shape=(3,), dtype=float32)}
    """
    return {
        n.name: jax.ShapeDtypeStruct(n.aval.shape, n.aval.dtype)
        for n in named(trace(function, args, options).closed)
    }


def capture(
    function: Callable[..., PyTree],
    names: str | Sequence[str],
    *,
    stats: bool = False,
    exact: bool = False,
    bins: int = 32,
) -> Callable[..., tuple[PyTree, dict[str, Any]]]:
    """Return a function of ``(out, captured)``: what ``function`` returns, and values by name.

    A value is named by ``jax.ad_checkpoint.checkpoint_name``; the results of a scope
    (``jax.named_scope``, a flax module) by the scope; the results of each function of the
    user's code by the calls that lead to it, such as ``apply/layer/rms_norm``. A name that occurs
    several times is numbered: ``h``, ``h.1``; equal scopes that follow each other directly count
    as one. :func:`captured_names` lists all names. Nothing in the model
    changes, and it goes through jit, grad, vmap and scan like any function.

    Inside a scan values come out stacked ``[L, ...]``, inside a ``while`` from the last turn,
    inside a branch of ``cond`` as NaN (or zero) if the branch was not taken, inside ``shard_map``
    with one row per device. In a gradient, names of its backward pass begin with ``backward``.

    Law: ``capture(f, names)(*args)[0] == f(*args)``, compiled: up to rounding, because a
    compiler fuses operations otherwise around a value that has to be stored; and bit for bit
    with ``exact=True``. With ``names=()`` the jaxpr is that of ``f``.

    Args:
      function: any function of arrays.
      names: names, or path globs of names.
      stats: whether to return :class:`Stats` instead of the values.
      exact: whether to compute what is captured in a second evaluation that the first one
        shares nothing with, so that the function's own bits cannot change; it costs twice.
      bins: the bins of a histogram.

    Raises:
      ConfigError: a glob matches no name (when called).

    >>> def layer(x, w):
    ...     return jnp.tanh(x * w), None
    >>> def deep(ws):
    ...     return jax.lax.scan(layer, jnp.float32(1.0), ws)[0]
    >>> out, captured = capture(deep, "**/layer")(jnp.array([1.0, 2.0]))
    >>> {name: value.shape for name, value in captured.items()}
    {'deep/layer': (2,)}
    """
    globs = (names,) if isinstance(names, str) else tuple(names)

    @functools.wraps(function)
    def captured(*args: Any, **options: Any) -> tuple[PyTree, dict[str, Any]]:
        traced = trace(function, args, options)
        if not globs:
            out = jex_core.jaxpr_as_fun(traced.closed)(*traced.flat)
            return jax.tree.unflatten(traced.tree, out), {}
        rules = observing(_chosen(named(traced.closed), globs))
        if stats:
            rules = rules._replace(observe=_described(rules.observe, bins))
        if exact:
            out = jex_core.jaxpr_as_fun(traced.closed)(*traced.flat)
            _, seen = walk(traced.closed, _apart(traced.flat), rules)
        else:
            out, seen = walk(traced.closed, traced.flat, rules)
        result = _gathered(seen) if stats else seen
        return jax.tree.unflatten(traced.tree, out), result

    return captured


def observing(chosen: Sequence[Named]) -> Rules:
    """Return the rules that hand out these values."""
    at: dict[Site, list[Named]] = {}
    for one in chosen:
        at.setdefault(one.site, []).append(one)
    inside = {site[:k] for site in at for k in range(1, len(site))}

    def observe(site: Site, eqn: Any, results: list[Any]) -> Seen:
        return {one.name: results[one.output] for one in at.get(site, ())}

    return Rules(observe=observe, wanted=lambda site, eqn: site in inside)


def _chosen(known: list[Named], globs: tuple[str, ...]) -> list[Named]:
    every = [one.name for one in known]
    faults = [
        f"{glob!r} matches none of the {len(every)} names.{nearest(glob, every)}"
        for glob in globs
        if not any(matches(name, glob) for name in every)
    ]
    if faults:
        raise ConfigError(
            "\n".join(faults) + "\ncaptured_names(function, *args) lists what there is, such as "
            f"{', '.join(every[:6])}"
        )
    return [one for one in known if matches(one.name, globs)]


def _described(observe: Any, bins: int) -> Any:
    def described(site: Site, eqn: Any, results: list[Any]) -> Seen:
        return {
            f"{name}\n{field}": value
            for name, x in observe(site, eqn, results).items()
            for field, value in array_stats(x, bins)._asdict().items()
        }

    return described


def _gathered(seen: Seen) -> dict[str, Stats]:
    fields: dict[str, dict[str, jax.Array]] = {}
    for key, value in seen.items():
        name, field = key.rsplit("\n", 1)
        fields.setdefault(name, {})[field] = value
    return {name: Stats(**values) for name, values in fields.items()}


def _apart(flat: list[Any]) -> list[Any]:
    """Return the same values so that the compiler does not know that they are the same."""

    def plain(x: Any) -> bool:
        return not jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)

    arrays = iter(lax.optimization_barrier([x for x in flat if plain(x)]))
    return [next(arrays) if plain(x) else x for x in flat]
