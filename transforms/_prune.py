"""Set the least weights to zero, and keep them there."""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fnml.core import ConfigError, Model, Param, leaf_names, map_with_name
from fnml.transforms._edited import (
    Edited,
    FrozenParam,
    Targets,
    as_matrix,
    matrices,
    opened,
    refuse_order,
    stack_depth,
)
from fnml.transforms._freeze import hold

PyTree = Any
Scope = Literal["each", "global"]


def prune(
    model: Model,
    sparsity: float = 0.5,
    *,
    scope: Scope = "each",
    pattern: tuple[int, int] | None = None,
    targets: Targets = None,
) -> Model:
    """Multiply weights by a mask that keeps the largest.

    Parameters become ``{"base": ..., "mask": {path: bool array}}``. :func:`adapt` takes the mask
    from given parameters; as drawn by ``init`` it keeps everything. The mask is frozen: train
    with :func:`trainable_value_and_grad` and :func:`train_only`, or prune more and more while
    training with :func:`sparsify`.

    Laws: pruned weights are exactly 0 in every call, and so is their gradient. After ``adapt``
    they are also stored as 0, and an optimizer that maps a gradient of 0 at a weight of 0 to an
    update of 0 (all of Optax's usual ones, weight decay included) leaves them so. Of ``n``
    weights exactly ``round(n * sparsity)`` are pruned; ties go by position.

    Source: Han et al. 2015, arXiv:1506.02626, section 3.1; the n:m pattern: Mishra et al. 2021,
    arXiv:2104.08378.

    Args:
      sparsity: the share of weights that are 0; not read with a pattern.
      scope: ``"each"`` prunes that share of each parameter, of each layer in a stack;
        ``"global"`` of all targets together, so that some lose more than others.
      pattern: ``(n, m)`` keeps the ``n`` largest of every ``m`` consecutive inputs of an output,
        as (2, 4) for sparse matrix units; ``m`` divides the inputs of every target.
      targets: path globs in the spec of the plain model, by default every float matrix.

    Raises:
      ConfigError: a number is out of range, a pattern does not divide a weight's inputs, or a
        target is no float matrix; all are listed.
      LayoutError: ``model`` is quantised.

    >>> from fnml.models import MLPConfig, mlp
    >>> from fnml.transforms import adapt, merge
    >>> model = prune(mlp(MLPConfig(inputs=4, hidden=(), outputs=1)), 0.5)
    >>> head = {"kernel": jnp.array([[1.0], [-3.0], [2.0], [0.5]]), "bias": jnp.zeros(1)}
    >>> merge(model, adapt(model, {"hidden": [], "head": head}))["head"]["kernel"].tolist()
    [[0.0], [-3.0], [2.0], [0.0]]
    """
    refuse_order(
        model,
        "prune",
        {
            "quantize": "a mask is taken from weights before they are rounded: "
            "quantize(prune(model, ...), ...)"
        },
    )
    inner = opened(model)
    chosen = matrices(inner.root.spec, targets, "prune")
    check_sparsity("prune", sparsity, scope)
    _check_pattern(pattern, chosen)
    masks = {
        path: FrozenParam(p.shape, p.axes, jax.nn.initializers.ones, jnp.bool_)
        for path, p in chosen.items()
    }

    def masked(params: PyTree, kept: PyTree) -> PyTree:
        return map_with_name(
            lambda name, w: jnp.where(kept[name], w, jnp.zeros_like(w)) if name in kept else w,
            params,
        )

    def weights(params: PyTree, key: jax.Array | None) -> PyTree:
        return masked(inner.weights(params["base"], key), jax.tree.map(hold, params["mask"]))

    def store(params: PyTree, key: jax.Array | None) -> PyTree:
        names = dict(zip(leaf_names(params), jax.tree.leaves(params), strict=True))
        found = {path: names[path] for path in chosen}
        take = functools.partial(_masks, chosen, sparsity, scope, pattern)
        kept = jax.jit(take)(found)
        return {"base": inner.store(masked(params, kept), key), "mask": kept}

    spec = {"base": model.spec, "mask": masks}
    return Model(spec, Edited(inner.root, weights, store, (*inner.names, "prune")), model.state)


def check_sparsity(name: str, sparsity: float, scope: str) -> None:
    """Refuse a share outside of [0, 1) and a scope that there is not.

    Raises:
      ConfigError: both are named.
    """
    faults = [] if 0 <= sparsity < 1 else [f"sparsity={sparsity}: expected 0 or more, and below 1"]
    faults += [] if scope in ("each", "global") else [f"scope={scope!r}: 'each' or 'global'"]
    if faults:
        raise ConfigError(f"{name}: " + "; ".join(faults))


def highest(values: jax.Array, count: jax.Array | int) -> jax.Array:
    """Return which of ``values`` [N] are the ``count`` highest, the first of equals.

    >>> highest(jnp.array([1.0, 3.0, 1.0]), 2).tolist()
    [True, True, False]
    """
    order = jnp.argsort(-values, stable=True)
    places = jnp.arange(values.size, dtype=jnp.int32)
    return jnp.zeros_like(places).at[order].set(places) < count


def kept_count(size: int, sparsity: float) -> int:
    """Return how many of ``size`` weights a share of zeros leaves."""
    return size - round(size * sparsity)


def _masks(
    chosen: dict[str, Param],
    sparsity: float,
    scope: Scope,
    pattern: tuple[int, int] | None,
    found: dict[str, jax.Array],
) -> dict[str, jax.Array]:
    if pattern is not None:
        return {path: _patterned(w, chosen[path], *pattern) for path, w in found.items()}
    if scope == "global":
        flat = jnp.concatenate([jnp.abs(w.astype(jnp.float32)).reshape(-1) for w in found.values()])
        return split_like(highest(flat, kept_count(flat.size, sparsity)), found)

    def each(path: str, w: jax.Array) -> jax.Array:
        layers = math.prod(w.shape[: stack_depth(chosen[path])])
        rows = jnp.abs(w).reshape(layers, -1)
        count = kept_count(rows.shape[1], sparsity)
        return jax.vmap(lambda row: highest(row, count))(rows).reshape(w.shape)

    return {path: each(path, w) for path, w in found.items()}


def split_like(flat: jax.Array, like: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Cut a vector into arrays of the shapes of ``like``, in their order."""
    out, at = {}, 0
    for path, w in like.items():
        out[path] = flat[at : at + w.size].reshape(w.shape)
        at += w.size
    return out


def _patterned(w: jax.Array, param: Param, n: int, m: int) -> jax.Array:
    matrix = as_matrix(param)
    runs = jnp.swapaxes(jnp.abs(w).reshape(matrix.shape), -1, -2).reshape(-1, m)
    kept = jax.vmap(lambda run: highest(run, n))(runs)
    turned = kept.reshape(*matrix.shape[:-2], matrix.outputs, matrix.inputs)
    return jnp.swapaxes(turned, -1, -2).reshape(w.shape)


def _check_pattern(pattern: tuple[int, int] | None, chosen: dict[str, Param]) -> None:
    if pattern is None:
        return
    n, m = pattern
    faults = [] if 1 <= n <= m else [f"pattern={pattern}: expected (n, m) with 1 <= n <= m"]
    faults += [
        f"pattern={pattern}: {m} does not divide the {as_matrix(param).inputs} inputs of {path}"
        for path, param in chosen.items()
        if 1 <= n <= m and as_matrix(param).inputs % m
    ]
    if faults:
        raise ConfigError("prune: " + "; ".join(faults))
