"""Tree ensembles of ai.onnx.ml: TreeEnsemble and TreeEnsembleRegressor."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._ops_ml import POST_TRANSFORMS
from fnml.interop.onnx._static import traced


class _Trees(NamedTuple):
    """Nodes of all trees; a leaf's branches lead to itself.

    Attributes:
      roots: ``[T]``.
      feature: ``[N]``.
      split: ``[N]``.
      mode: ``[N]``, the comparison's place in ``_MODES``.
      branches: ``[N, 2]``, the node after a comparison that is false, or true.
      missing: ``[N]``, whether NaN counts as true.
      members: ``[N, M]``, filled up with NaN.
      weights: ``[N, O]``, what a leaf adds to each output.
      reached: ``[N, O]``, which outputs it speaks of.
    """

    roots: np.ndarray
    feature: np.ndarray
    split: np.ndarray
    mode: np.ndarray
    branches: np.ndarray
    missing: np.ndarray
    members: np.ndarray
    weights: np.ndarray
    reached: np.ndarray


_MODES = ("LEQ", "LT", "GTE", "GT", "EQ", "NEQ", "MEMBER")


def _depth(trees: _Trees) -> int:
    """Return how many comparisons the longest way down has.

    A file may hold a cycle, which would never end: then as many as there are nodes.
    """
    nodes, steps = np.unique(trees.roots), 0
    while steps < len(trees.feature):
        following = np.unique(trees.branches[nodes])
        if np.array_equal(following, nodes):
            break
        nodes, steps = following, steps + 1
    return steps


def _leaves(trees: _Trees, x: Any) -> Any:
    """Return the leaf that each row of ``x [B, F]`` reaches in each tree, ``[B, T]``."""
    as_input = lambda values: jnp.asarray(values.astype(x.dtype))
    split, members = as_input(trees.split), as_input(trees.members)
    feature, mode = jnp.asarray(trees.feature), jnp.asarray(trees.mode)
    branches, missing = jnp.asarray(trees.branches), jnp.asarray(trees.missing)

    def down(_: Any, place: Any) -> Any:
        value = jnp.take_along_axis(x, feature[place], axis=1)
        limit, kind = split[place], mode[place]
        tests = [value <= limit, value < limit, value >= limit, value > limit]
        tests += [value == limit, value != limit]
        tests.append((value[..., None] == members[place]).any(-1))
        chosen = jnp.take_along_axis(jnp.stack(tests, -1), kind[..., None], axis=-1)[..., 0]
        chosen = jnp.where(jnp.isnan(value), missing[place], chosen)
        return branches[place, chosen.astype(jnp.int32)]

    start = jnp.broadcast_to(jnp.asarray(trees.roots)[None], (x.shape[0], len(trees.roots)))
    return lax.fori_loop(0, _depth(trees), down, start)


def _scores(trees: _Trees, x: Any, how: str, base: Any) -> Any:
    """Aggregate the leaves that ``x [B, F]`` reaches onto ``base [O]``: ``[B, O]``.

    An output that no leaf speaks of is zero, as in onnxruntime.
    """
    leaves = _leaves(trees, x)
    weights = jnp.asarray(trees.weights.astype(x.dtype))[leaves]
    some = jnp.asarray(trees.reached)[leaves]
    if how in ("SUM", "AVERAGE"):
        y = weights.sum(1) / (len(trees.roots) if how == "AVERAGE" else 1)
    elif how == "MIN":
        y = jnp.where(some, weights, jnp.inf).min(1)
    else:
        y = jnp.where(some, weights, -jnp.inf).max(1)
    return jnp.where(some.any(1), y + jnp.asarray(np.asarray(base, x.dtype))[None], 0)


def _ids(node: Node, name: str, dtype: Any = np.int32) -> np.ndarray:
    return np.array(node.attributes.get(name) or [], dtype)


def _member_sets(values: np.ndarray, mode: np.ndarray) -> np.ndarray:
    """Deal out sets, divided by NaN, to the nodes that test membership."""
    ends = np.flatnonzero(np.isnan(values))
    sets = [s[~np.isnan(s)] for s in np.split(values, ends)]
    width = max((len(s) for s in sets), default=0)
    members = np.full((len(mode), max(width, 1)), np.nan)
    for row, kept in zip(np.flatnonzero(mode == 6), sets, strict=False):
        members[row, : len(kept)] = kept
    return members


def _tree_ensemble(node: Node, x: Any) -> Any:
    (x,) = traced(node, x)
    get: Any = node.attributes.get
    targets, count = _ids(node, "leaf_targetids"), len(get("nodes_featureids"))
    total = count + len(targets)
    own = np.arange(count, total)
    sides = []
    for side in ("false", "true"):
        leaf = _ids(node, f"nodes_{side}leafs")
        inner = _ids(node, f"nodes_{side}nodeids") + np.where(leaf != 0, count, 0)
        sides.append(np.concatenate([inner, own]))
    pad = lambda values, dtype: np.concatenate([values, np.zeros(len(targets))]).astype(dtype)
    mode = pad(np.ravel(get("nodes_modes")), np.int32)
    members = get("membership_values")
    members = np.zeros(0) if members is None else np.ravel(members).astype(np.float64)
    weights = np.zeros((total, get("n_targets")))
    weights[own, targets] = np.ravel(get("leaf_weights")).astype(np.float64)
    reached = np.zeros(weights.shape, np.bool_)
    reached[own, targets] = True
    trees = _Trees(
        roots=_ids(node, "tree_roots"),
        feature=pad(_ids(node, "nodes_featureids"), np.int32),
        split=pad(np.ravel(get("nodes_splits")).astype(np.float64), np.float64),
        mode=mode,
        branches=np.stack(sides, 1).astype(np.int32),
        missing=pad(get("nodes_missing_value_tracks_true") or np.zeros(count), bool),
        members=_member_sets(members, mode),
        weights=weights,
        reached=reached,
    )
    how = ("AVERAGE", "SUM", "MIN", "MAX")[get("aggregate_function", 1)]
    return tuple(POST_TRANSFORMS.values())[get("post_transform", 0)](_scores(trees, x, how, [0.0]))


def _tree_regressor(node: Node, x: Any) -> Any:
    (x,) = traced(node, x)
    get: Any = node.attributes.get
    keys = list(zip(_ids(node, "nodes_treeids"), _ids(node, "nodes_nodeids"), strict=True))
    places = {key: place for place, key in enumerate(keys)}
    leaf = np.array([mode == "LEAF" for mode in get("nodes_modes")])
    own = np.arange(len(keys))
    sides = []
    for side in ("false", "true"):
        ids = _ids(node, f"nodes_{side}nodeids")
        inner = [places.get((tree, i), 0) for (tree, _), i in zip(keys, ids, strict=True)]
        sides.append(np.where(leaf, own, inner))
    split = get("nodes_values_as_tensor")
    base = get("base_values_as_tensor")
    base = get("base_values") or [0.0] if base is None else np.ravel(base)
    weights = np.zeros((len(keys), get("n_targets")))
    reached = np.zeros(weights.shape, np.bool_)
    values = get("target_weights_as_tensor")
    values = get("target_weights") if values is None else np.ravel(values)
    rows = zip(_ids(node, "target_treeids"), _ids(node, "target_nodeids"), strict=True)
    for row, target, value in zip(rows, _ids(node, "target_ids"), values, strict=True):
        weights[places[row], target] += value
        reached[places[row], target] = True
    entered = np.isin(own, np.concatenate([side[~leaf] for side in sides]))
    trees = _Trees(
        roots=own[~entered].astype(np.int32),
        feature=_ids(node, "nodes_featureids"),
        split=np.array(get("nodes_values") if split is None else np.ravel(split), np.float64),
        mode=np.array([0 if m == "LEAF" else _MODES.index(m[7:]) for m in get("nodes_modes")]),
        branches=np.stack(sides, 1).astype(np.int32),
        missing=np.array(get("nodes_missing_value_tracks_true") or np.zeros(len(keys)), bool),
        members=np.full((len(keys), 1), np.nan),
        weights=weights,
        reached=reached,
    )
    wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    y = _scores(trees, wide, get("aggregate_function", "SUM"), base)
    return POST_TRANSFORMS[get("post_transform", "NONE")](y).astype(jnp.float32)


OPERATORS: Mapping[str, Operator] = {
    "ai.onnx.ml.TreeEnsemble": _tree_ensemble,
    "ai.onnx.ml.TreeEnsembleRegressor": _tree_regressor,
}
