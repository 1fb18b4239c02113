"""Dynamic loss scaling: gradients that float16 can hold, with the scale as explicit state."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnml.core import ConfigError, LayoutError, Mean, Metrics, State
from fnml.transforms._layout import GradFn
from fnml.transforms._mixed_precision import LossFn, refuse_gradients
from fnml.transforms._skip_nonfinite import all_finite, undo_unless

PyTree = Any
Step = Callable[[State, PyTree], tuple[State, dict[str, Mean]]]


class LossScale(NamedTuple):
    """What dynamic loss scaling carries from step to step.

    Attributes:
      scale: float32 scalar, a power of two.
      good_steps: int32 scalar, the steps without overflow since the scale last changed.
    """

    scale: jax.Array
    good_steps: jax.Array


class LossScaled(NamedTuple):
    """``State.opt_state`` under :func:`loss_scaling`: the scale beside the optimizer's state."""

    loss_scale: LossScale
    inner: PyTree


def scaled_value_and_grad(loss_fn: LossFn) -> GradFn:
    """Differentiate a loss that is multiplied by a scale, and divide the gradients by it.

    Small gradients of float16 activations would round to 0; scaled up, they do not. The scale is
    an option, ``grad_fn(params, batch, key, loss_scale=scale)``, which layout transforms hand on to
    every shard; :func:`loss_scaling` finds a good one. The loss and the metrics returned are not
    scaled; the metric ``"loss_scale"`` is the scale.

    Law: ``scaled_value_and_grad(f)(..., loss_scale=2**k) == jax.value_and_grad(f,
    has_aux=True)(...)`` bit for bit, where nothing overflows or underflows.

    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2.

    Args:
      loss_fn: a loss; usually ``mixed_precision(loss_fn, Policy(compute="float16"))``.

    Returns:
      A ``grad_fn`` with one more option, ``loss_scale``, a float32 scalar that defaults to 1.

    Raises:
      LayoutError: ``loss_fn`` is a gradient function; the message names the order that works.
      ConfigError: the loss has a metric ``"loss_scale"`` already (when called).

    >>> import jax, jax.numpy as jnp
    >>> def loss_fn(params, batch, key):
    ...     return jnp.float32(2.0) * params, Metrics(jnp.float32(1.0))
    >>> (loss, _), grads = scaled_value_and_grad(loss_fn)(
    ...     jnp.float32(3.0), None, None, loss_scale=jnp.float32(1024.0)
    ... )
    >>> float(loss), float(grads)
    (6.0, 2.0)
    """
    refuse_gradients(loss_fn, "scaled_value_and_grad")

    def grad_fn(
        params: PyTree,
        batch: PyTree,
        key: jax.Array | None,
        *,
        loss_scale: jax.Array | None = None,
        **options: Any,
    ) -> tuple[tuple[jax.Array, Metrics], PyTree]:
        one = jnp.ones((), jnp.float32)
        scale = one if loss_scale is None else loss_scale

        def scaled(params: PyTree) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
            out = loss_fn(params, batch, key, **options)
            refuse_gradients(out, "scaled_value_and_grad")
            loss, metrics = out
            return loss.astype(jnp.float32) * scale, (loss, metrics)

        (_, (loss, metrics)), grads = jax.value_and_grad(scaled, has_aux=True)(params)
        if "loss_scale" in metrics.values:
            raise ConfigError("a loss's metrics cannot be named 'loss_scale': that is the scale")
        values = {**metrics.values, "loss_scale": Mean(scale, one)}
        # The reciprocal of a power of two is exact, and so is the product with it.
        inverse = 1 / scale

        def unscale(g: jax.Array) -> jax.Array:
            wide = g.astype(jnp.float32) if g.dtype.itemsize < 4 else g
            return (wide * inverse.astype(wide.dtype)).astype(g.dtype)

        return (loss, dataclasses.replace(metrics, values=values)), jax.tree.map(unscale, grads)

    return grad_fn


def with_loss_scale(state: State, initial: float = 2.0**15) -> State:
    """Put a loss scale into a state, for a step made by :func:`loss_scaling`.

    Raises:
      ConfigError: ``initial`` is no power of two, or the state has a loss scale already.

    >>> import jax, jax.numpy as jnp, optax
    >>> state = State.create(jnp.ones(2), optax.sgd(0.1), jax.random.key(0))
    >>> float(with_loss_scale(state, 8.0).opt_state.loss_scale.scale)
    8.0
    """
    if isinstance(state.opt_state, LossScaled):
        raise ConfigError("the state has a loss scale already: apply with_loss_scale once")
    _check_powers(initial=initial)
    scale = LossScale(jnp.full((), initial, jnp.float32), jnp.zeros((), jnp.int32))
    return dataclasses.replace(state, opt_state=LossScaled(scale, state.opt_state))


def loss_scaling(
    make_step: Callable[[GradFn], Step],
    grad_fn: GradFn,
    *,
    interval: int = 2000,
    factor: float = 2.0,
    smallest: float = 1.0,
    largest: float = 2.0**24,
) -> Step:
    """Make a training step that finds the largest loss scale without overflow, as it trains.

    A step whose gradients are not finite is undone (see :func:`skip_nonfinite`) and the scale is
    divided by ``factor``; after ``interval`` good steps in a row it is multiplied by it. The scale
    lives in ``State.opt_state``, so it is saved, resumed and fused with everything else. The
    metrics ``"loss_scale"`` and ``"overflow"`` tell the scale and the share of undone steps.

    The scale reaches the gradient function as the option ``loss_scale``, through any layout:
    ``loss_scaling(lambda g: train_step(g, optimizer),
    accumulate(scaled_value_and_grad(loss_fn), n))``.

    Law: while nothing overflows or underflows, parameters, optimizer state and metrics are those
    of ``make_step(jax.value_and_grad(loss_fn, has_aux=True))``, to rounding whatever the scale.

    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2 (choosing the scale).

    Args:
      make_step: makes a step of a gradient function.
      grad_fn: a gradient function made by :func:`scaled_value_and_grad`, plain or laid out.
      interval: good steps before the scale grows.
      factor: how much it grows or shrinks by, a power of two.
      smallest: the least scale.
      largest: the greatest scale.

    Returns:
      ``step(state, batch) -> (state, metrics)`` for a state from :func:`with_loss_scale`.

    Raises:
      ConfigError: an argument is out of range; when called, the state has no loss scale, or a
        metric has a name that this needs.
      LayoutError: when called, ``grad_fn`` was not made by :func:`scaled_value_and_grad`, or
        ``make_step`` makes several steps at once, as ``fuse`` and ``population`` do.

    >>> import jax, jax.numpy as jnp, optax
    >>> from fnml.train import train_step
    >>> def loss_fn(params, batch, key):
    ...     error = Mean.of((params - batch) ** 2)
    ...     return error.value, Metrics(error.weight)
    >>> optimizer = optax.sgd(0.5)
    >>> step = loss_scaling(lambda g: train_step(g, optimizer), scaled_value_and_grad(loss_fn))
    >>> state = State.create(jnp.float32(2.0), optimizer, jax.random.key(0))
    >>> state, metrics = step(with_loss_scale(state, 2.0**127), jnp.float32(1.0))
    >>> float(state.params), float(state.opt_state.loss_scale.scale) == 2.0**126
    (2.0, True)
    >>> state, metrics = step(state, jnp.float32(1.0))
    >>> float(state.params), float(metrics["overflow"].value)
    (1.0, 0.0)
    """
    if interval < 1 or factor <= 1 or smallest > largest:
        raise ConfigError(
            f"loss_scaling needs interval >= 1, factor > 1 and smallest <= largest, got "
            f"interval={interval}, factor={factor}, smallest={smallest}, largest={largest}"
        )
    _check_powers(factor=factor, smallest=smallest, largest=largest)

    def adjust(loss_scale: LossScale, fine: jax.Array) -> LossScale:
        scale, good = loss_scale.scale, loss_scale.good_steps + 1
        grow = good >= interval
        grown = jnp.where(grow, jnp.minimum(scale * factor, largest), scale)
        shrunk = jnp.maximum(scale / factor, smallest)
        none = jnp.zeros_like(good)
        return LossScale(jnp.where(fine, grown, shrunk), jnp.where(fine & ~grow, good, none))

    def step(state: State, batch: PyTree) -> tuple[State, dict[str, Mean]]:
        if not isinstance(state.opt_state, LossScaled):
            raise ConfigError(
                "the state has no loss scale: start from with_loss_scale(State.create(...))"
            )
        loss_scale, inner = state.opt_state
        bare = dataclasses.replace(state, opt_state=inner)
        new, metrics = make_step(_judged(grad_fn, loss_scale.scale))(bare, batch)
        # Where an inner skip_nonfinite undid the step, the mark of a good one weighs nothing too.
        fine = metrics.pop("overflow").weight > 0
        if fine.ndim:
            raise LayoutError(
                "loss_scaling judges one step at a time, and this make_step takes "
                f"{fine.shape[0]} at once: put it inside, fuse(loss_scaling(make_step, grad_fn), k) "
                "or population(loss_scaling(make_step, grad_fn))"
            )
        new, metrics = undo_unless(fine, bare, new, metrics)
        one = jnp.ones((), jnp.float32)
        metrics = {
            **metrics,
            "loss_scale": Mean(loss_scale.scale, one),
            "overflow": Mean(jnp.where(fine, 0 * one, one), one),
        }
        scaled = LossScaled(adjust(loss_scale, fine), new.opt_state)
        return dataclasses.replace(new, opt_state=scaled), metrics

    return step


def _judged(grad_fn: GradFn, scale: jax.Array) -> GradFn:
    """Call ``grad_fn`` with a scale; its metric ``"overflow"`` weighs 1 if all is finite, else 0."""

    def judged(
        params: PyTree, batch: PyTree, key: jax.Array, **options: Any
    ) -> tuple[tuple[jax.Array, Metrics], PyTree]:
        order = (
            "loss_scaling needs gradients of a scaled loss: "
            "loss_scaling(make_step, accumulate(scaled_value_and_grad(loss_fn), n)), not "
            "jax.value_and_grad(loss_fn, has_aux=True)"
        )
        try:
            out = grad_fn(params, batch, key, loss_scale=scale, **options)
        except TypeError as error:
            if "loss_scale" not in str(error):
                raise
            raise LayoutError(order) from error
        (loss, metrics), grads = out
        if "loss_scale" not in metrics.values:
            raise LayoutError(order)
        if "overflow" in metrics.values:
            raise ConfigError("a loss's metrics cannot be named 'overflow': that is the scaling's")
        good = all_finite(grads).astype(jnp.float32)
        values = {**metrics.values, "overflow": Mean(jnp.zeros_like(good), good)}
        return (loss, dataclasses.replace(metrics, values=values)), grads

    return judged


def _check_powers(**given: float) -> None:
    """Refuse what is no power of two: only those scale without rounding."""
    faults = [f"{name}={value}" for name, value in given.items() if not _is_power(value)]
    if faults:
        raise ConfigError(
            f"loss scales are powers of two, which scale without rounding: got {', '.join(faults)}"
        )


def _is_power(value: float) -> bool:
    return value > 0 and float(value).hex().startswith("0x1.0000000000000p")
