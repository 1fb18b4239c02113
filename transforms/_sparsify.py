"""Prune more and more while training."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fnml.core import ConfigError, leaf_names, map_with_name, mask
from fnml.transforms._edited import Targets, is_float
from fnml.transforms._prune import Scope, check_sparsity, highest, split_like

PyTree = Any
Schedule = Callable[[jax.Array], jax.Array]


def cubic_sparsity(final: float, steps: int, *, begin: int = 0, initial: float = 0.0) -> Schedule:
    """Return the share of zeros by step: fast at first, slowly towards its end.

    Law: ``s(t) = final + (initial - final) * (1 - (t - begin) / steps)**3`` for ``begin <= t <=
    begin + steps``; before it is ``initial``, after it is ``final``. It is a pure function of the
    step, float32, for Python and traced integers.

    Source: Zhu and Gupta 2017, arXiv:1710.01878, equation 1.

    Raises:
      ConfigError: a share is outside of [0, 1), ``final`` is below ``initial``, or ``steps`` is
        below 1; all are listed.

    >>> schedule = cubic_sparsity(0.8, 100)
    >>> [round(float(schedule(step)), 3) for step in (0, 50, 100, 200)]
    [0.0, 0.7, 0.8, 0.8]
    """
    faults = [
        f"{name}={value}: expected 0 or more, and below 1"
        for name, value in (("final", final), ("initial", initial))
        if not 0 <= value < 1
    ]
    faults += [] if final >= initial else [f"final={final} is below initial={initial}"]
    faults += [] if steps >= 1 else [f"steps={steps}: expected 1 or more"]
    if faults:
        raise ConfigError("cubic_sparsity: " + "; ".join(faults))

    def schedule(step: jax.Array | int) -> jax.Array:
        done = (jnp.asarray(step, jnp.float32) - begin) / steps
        return final + (initial - final) * (1 - jnp.clip(done, 0, 1)) ** 3

    return schedule


class SparsifyState(NamedTuple):
    """The optimizer state of :func:`sparsify`.

    Attributes:
      steps: int32 scalar, the number of updates done.
      masks: bool arrays by path: the weights that are left.
      inner: the inner optimizer's state.
    """

    steps: jax.Array
    masks: dict[str, jax.Array]
    inner: PyTree


def sparsify(
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    every: int = 100,
    scope: Scope = "each",
    targets: Targets = None,
) -> optax.GradientTransformationExtraArgs:
    """Prune the least weights as a schedule says, while an optimizer trains the others.

    The masks are part of ``State.opt_state``: saved, resumed and fused with everything else.
    Update ``t = 0, every, 2 * every, ...`` takes them anew, from the weights that it leaves.

    Laws: after update ``t``, in each target (or in all together) the share of weights that are
    exactly 0 is at least ``schedule`` of the last ``t`` that took masks, and equals it, rounded
    to a whole number, where no kept weight is 0 itself. A weight that was pruned stays 0. The
    others' updates are the inner optimizer's on gradients that are 0 where pruned.

    Source: Zhu and Gupta 2017, arXiv:1710.01878, section 3.

    Args:
      optimizer: an Optax optimizer; it is given gradients of 0 for pruned weights.
      schedule: ``schedule(step) -> share``, growing, such as :func:`cubic_sparsity`.
      every: how many updates lie between two masks.
      scope: see :func:`prune`; a parameter of stacked layers counts as one.
      targets: path globs of parameters, by default every float array of two or more dimensions.

    Raises:
      ConfigError: ``every`` is below 1, the scope is unknown, a glob matches nothing, a target
        holds no floats, or ``update`` is called without parameters.

    >>> optimizer = sparsify(optax.sgd(0.1), lambda step: jnp.float32(0.5), every=1)
    >>> params = {"kernel": jnp.array([[1.0, -3.0], [2.0, 0.5]])}
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> [round(float(x), 4) for x in optax.apply_updates(params, updates)["kernel"].ravel()]
    [0.0, -2.7, 1.8, 0.0]
    """
    check_sparsity("sparsify", 0.0, scope)
    if every < 1:
        raise ConfigError(f"sparsify: every={every}: expected 1 or more")
    inner = optax.with_extra_args_support(optimizer)

    def chosen(params: PyTree) -> dict[str, jax.Array]:
        named = zip(
            leaf_names(params),
            jax.tree.leaves(params),
            jax.tree.leaves(mask(params, targets or "**")),
            strict=True,
        )
        picked = {name: p for name, p, hit in named if hit}
        if targets is None:
            picked = {name: p for name, p in picked.items() if is_float(p) and p.ndim > 1}
        faults = [f"{name}: {p.dtype}" for name, p in picked.items() if not is_float(p)]
        if faults or not picked:
            listing = ", ".join(faults) or "no parameter at all"
            raise ConfigError(f"sparsify prunes arrays of floats, its targets are {listing}")
        return picked

    def init(params: PyTree) -> SparsifyState:
        masks = {name: jnp.ones(p.shape, jnp.bool_) for name, p in chosen(params).items()}
        return SparsifyState(jnp.zeros((), jnp.int32), masks, inner.init(params))

    def update(
        grads: PyTree, state: SparsifyState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, SparsifyState]:
        if params is None:
            raise ConfigError("sparsify prunes parameters: call update(grads, state, params)")
        grads = _masked(grads, state.masks)
        updates, inner_state = inner.update(grads, state.inner, params, **extra)
        after = chosen(_masked(optax.apply_updates(params, updates), state.masks))
        share = schedule(state.steps)
        masks = lax.cond(
            state.steps % every == 0,
            lambda: _least_dropped(after, state.masks, share, scope),
            lambda: state.masks,
        )
        # p + -p is exactly 0; whatever the optimizer wants of a pruned weight does not count.
        updates = map_with_name(
            lambda name, u, p: jnp.where(masks[name], u, -p) if name in masks else u,
            updates,
            params,
        )
        return updates, SparsifyState(state.steps + 1, masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _least_dropped(
    after: dict[str, jax.Array], masks: dict[str, jax.Array], share: jax.Array, scope: Scope
) -> dict[str, jax.Array]:
    def keep(flat: jax.Array, before: jax.Array) -> jax.Array:
        # A kept weight may be 0 too; what is pruned ranks below it and stays pruned.
        ranked = jnp.where(before, jnp.abs(flat.astype(jnp.float32)), -1)
        dropped = jnp.round(flat.size * share).astype(jnp.int32)
        return highest(ranked, flat.size - dropped) & before

    if scope == "global":
        flat, before = (
            jnp.concatenate([tree[name].reshape(-1) for name in after]) for tree in (after, masks)
        )
        return split_like(keep(flat, before), after)
    return {
        name: keep(w.reshape(-1), masks[name].reshape(-1)).reshape(w.shape)
        for name, w in after.items()
    }


def _masked(tree: PyTree, masks: dict[str, jax.Array]) -> PyTree:
    return map_with_name(
        lambda name, x: jnp.where(masks[name], x, jnp.zeros_like(x)) if name in masks else x, tree
    )
