"""Optimizers that can also change the parameters themselves: Adam's update as one pass in C++."""

from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax

from fnml.core import divided
from fnml.pallas_kernels.native import Updated, active, adamw_update, faults_of, on_cpu

PyTree = Any
Apply = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]


class InPlace(optax.GradientTransformationExtraArgs):
    """An Optax optimizer with a third function, ``apply(grads, state, params) -> (params, state)``.

    Law: it gives what ``update`` and ``optax.apply_updates`` give, to rounding: that of 1 - b2 ** count
    too, which Optax takes in float32.
    """

    apply: Apply

    def __new__(cls, rule: optax.GradientTransformation, apply: Apply) -> Self:
        """Give ``rule`` a third function."""
        self = super().__new__(cls, *optax.with_extra_args_support(rule))
        self.apply = apply
        return self


def apply_gradients(
    rule: optax.GradientTransformation, grads: PyTree, state: PyTree, params: PyTree
) -> tuple[PyTree, PyTree]:
    """Return the parameters and the optimizer's state after one step."""
    # Optax mixes floats and integers, which a user's strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        if isinstance(rule, InPlace):
            return rule.apply(grads, state, params)
        updates, state = rule.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def adam_in_place(
    rule: optax.GradientTransformation,
    rate: Callable[[Any], Any] | float,
    b1: float,
    b2: float,
    eps: float,
    decays: Callable[[PyTree], PyTree],
) -> InPlace:
    """Let Optax's ``adam`` or ``adamw`` run in C++ on a CPU, within ``native_kernels``.

    Args:
      rule: the optimizer, with the numbers that follow.
      rate: the learning rate, or a schedule of it.
      b1: the first moment's decay.
      b2: the second moment's decay.
      eps: what is added to the root of the second moment.
      decays: gives each parameter's weight decay.
    """

    def plain(grads: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = rule.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def native(grads: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        # Optax counts; XLA drops what else it computes here.
        _, (counted, *rest) = rule.update(grads, state, params)
        leaves, structure = jax.tree.flatten(params)
        held = map(Updated, leaves, *map(jax.tree.leaves, (state[0].mu, state[0].nu)))
        now = rate(state[0].count) if callable(rate) else rate
        updated = adamw_update(
            jax.tree.leaves(grads),
            list(held),
            jax.tree.leaves(decays(params)),
            rate=jnp.asarray(now, jnp.float32),
            count=counted.count,
            b1=b1,
            b2=b2,
            eps=eps,
        )
        params, mu, nu = (jax.tree.unflatten(structure, x) for x in zip(*updated, strict=True))
        return params, (counted._replace(mu=mu, nu=nu), *rest)

    def apply(grads: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        return (_in_cpp if _taken(grads, params) else plain)(grads, state, params)

    def _in_cpp(*operands: PyTree) -> tuple[PyTree, PyTree]:
        done: tuple[PyTree, PyTree] = on_cpu(native, plain, *operands)
        return done

    return InPlace(rule, apply)


def adamw(
    learning_rate: Callable[[Any], Any] | float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 1e-4,
    mask: Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformation:
    """Return ``optax.adamw``, which a step within :func:`fnml.transforms.native` runs in C++ on a CPU.

    There one pass over memory updates moments and parameters, if all are float32. ``update`` is
    Optax's everywhere, as are the state and its names.

    Law: ``train_step`` gives what it gives with ``optax.adamw``: the same bits outside, to rounding
    within.

    Args:
      learning_rate: a number, or a schedule.
      b1: the first moment's decay.
      b2: the second moment's decay.
      eps: what is added to the root of the second moment.
      weight_decay: how much of each parameter is subtracted, times the learning rate.
      mask: gives a tree of booleans, which parameters decay; ``None`` for all.

    >>> import jax.numpy as jnp
    >>> tx = adamw(0.1)
    >>> updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
    >>> [round(float(x), 4) for x in updates]
    [-0.1, -0.1]
    """
    rule = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask)

    def decays(params: PyTree) -> PyTree:
        chosen = mask(params) if mask else jax.tree.map(lambda p: True, params)
        return jax.tree.map(lambda has: weight_decay * has, chosen)

    return adam_in_place(rule, learning_rate, b1, b2, eps, decays)


def _taken(*trees: PyTree) -> bool:
    """Tell whether C++ takes all these arrays."""
    leaves = dict(enumerate(jax.tree.leaves(trees)))
    return (
        active()
        and not divided()
        and bool(leaves)
        and not faults_of(**{str(i): x for i, x in leaves.items()})
    )


def after(
    change: optax.GradientTransformation, rule: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Return ``optax.chain(change, rule)``, able to change the parameters itself if ``rule`` is."""
    chain = optax.chain(change, rule)
    if not isinstance(rule, InPlace):
        return chain

    def apply(grads: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        changed, first = change.update(grads, state[0], params)
        params, second = rule.apply(changed, state[1], params)
        return params, (first, second)

    return InPlace(chain, apply)
