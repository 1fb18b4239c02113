"""Gradients and optimizer state for the parameters that train, and for no others."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fnml.core import ConfigError, LayoutError, Metrics, Model, ShapeError, leaf_names
from fnml.transforms._edited import is_float
from fnml.transforms._freeze import trainable
from fnml.transforms._layout import GradFn, Laid, Whole

PyTree = Any
LossFn = Callable[..., tuple[jax.Array, Metrics]]


def trainable_value_and_grad(
    loss_fn: LossFn, model: Model, *, differentiate: Callable[[LossFn], GradFn] | None = None
) -> GradFn:
    """Differentiate a loss with respect to the parameters that train.

    It stands where ``jax.value_and_grad(loss_fn, has_aux=True)`` would: every transform of a
    gradient function goes around it. Frozen parameters may be integers, which ``jax.grad``
    refuses.

    Law: the loss, the metrics and the trained parameters' gradients are those of
    ``jax.value_and_grad``. The gradient of a frozen parameter is one 0 of shape (): it broadcasts
    in arithmetic, so that layouts, clipping and norms work, and costs nothing.

    Args:
      loss_fn: ``loss_fn(params, batch, key, **options) -> (loss, metrics)``; ``params`` are all.
      model: says which parameters train (:func:`freeze`, :func:`lora`, :func:`quantize`).
      differentiate: what makes the gradient function of the trained parameters, by default
        ``jax.value_and_grad`` with ``has_aux``; :func:`scaled_value_and_grad` is another.

    Raises:
      ConfigError: no parameter trains.
      LayoutError: ``loss_fn`` is a gradient function; the message names the order that works.
      ShapeError: the parameters are not the model's (when called).

    >>> from fnml.core import Mean, init
    >>> from fnml.models import MLPConfig, mlp
    >>> from fnml.transforms import freeze
    >>> model = freeze(mlp(MLPConfig(inputs=2, hidden=(), outputs=1)), "head/kernel")
    >>> def loss_fn(params, batch, key):
    ...     error = Mean.of(model.apply(params, batch) ** 2)
    ...     return error.value, Metrics(error.weight)
    >>> grad_fn = trainable_value_and_grad(loss_fn, model)
    >>> params = init(model.spec, jax.random.key(0))
    >>> jax.tree.map(jnp.shape, grad_fn(params, jnp.ones((3, 2)), jax.random.key(1))[1])
    {'head': {'bias': (1,), 'kernel': ()}, 'hidden': []}
    """
    if isinstance(loss_fn, Laid | Whole):
        raise LayoutError(
            "trainable_value_and_grad differentiates a loss, so it goes inside every transform of "
            "a gradient function: accumulate(trainable_value_and_grad(loss_fn, model), n)"
        )
    trains = _some_train(model, "trainable_value_and_grad")
    make = differentiate or functools.partial(jax.value_and_grad, has_aux=True)

    def grad_fn(
        params: PyTree, batch: PyTree, key: jax.Array | None, **options: Any
    ) -> tuple[tuple[jax.Array, Metrics], PyTree]:
        _check(params, trains)

        def of_trained(trained: PyTree, *args: Any, **options: Any) -> tuple[jax.Array, Metrics]:
            return loss_fn(_join(trains, trained, params), *args, **options)

        out, grads = make(of_trained)(_take(trains, params), batch, key, **options)
        zeros = jax.tree.map(
            lambda p: jnp.zeros((), p.dtype if is_float(p) else jnp.float32), params
        )
        return out, _join(trains, grads, zeros)

    return grad_fn


def train_only(
    optimizer: optax.GradientTransformation, model: Model
) -> optax.GradientTransformationExtraArgs:
    """Let an optimizer see only the parameters that train.

    Laws: its state is ``optimizer.init`` of the trained parameters, with ``None`` in the place of
    the others. The updates of trained parameters are the inner optimizer's, bit for bit; a frozen
    parameter keeps its bits, whatever gradient is given for it.

    Args:
      optimizer: an Optax optimizer.
      model: says which parameters train.

    Raises:
      ConfigError: no parameter trains, or ``update`` is called without parameters.
      ShapeError: the parameters are not the model's (when called).

    >>> from fnml.core import init
    >>> from fnml.models import MLPConfig, mlp
    >>> from fnml.transforms import lora
    >>> model = lora(mlp(MLPConfig(inputs=64, hidden=(), outputs=64)), rank=1)
    >>> state = train_only(optax.adam(1e-3), model).init(init(model.spec, jax.random.key(0)))
    >>> sum(moment.size for moment in jax.tree.leaves(state[0].mu))
    128
    """
    trains = _some_train(model, "train_only")
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> PyTree:
        _check(params, trains)
        return inner.init(_take(trains, params))

    def update(
        grads: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ConfigError("train_only keeps parameters: call update(grads, state, params)")
        _check(params, trains)
        updates, state = inner.update(_take(trains, grads), state, _take(trains, params), **extra)
        return _join(trains, updates, jax.tree.map(_nothing, params)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _nothing(p: jax.Array) -> jax.Array:
    """Return what leaves every bit of ``p`` alone when added: for floats -0, as -0 + 0 is 0."""
    return jnp.full((), -0.0, p.dtype) if is_float(p) else jnp.zeros((), p.dtype)


def _take(trains: PyTree, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda hit, x: x if hit else None, trains, tree)


def _join(trains: PyTree, trained: PyTree, rest: PyTree) -> PyTree:
    """Put the trained leaves, of a tree with ``None`` elsewhere, in the place of those of rest."""
    ours = iter(jax.tree.leaves(trained))
    return jax.tree.map(lambda hit, x: next(ours) if hit else x, trains, rest)


def _some_train(model: Model, name: str) -> PyTree:
    trains = trainable(model)
    if not any(jax.tree.leaves(trains)):
        raise ConfigError(
            f"{name}: all {len(jax.tree.leaves(trains))} parameters of the model are frozen, so "
            "nothing trains: freeze fewer, or add factors with lora(model, ...)"
        )
    return trains


def _check(params: PyTree, trains: PyTree) -> None:
    if jax.tree.structure(params) == jax.tree.structure(trains):  # type: ignore[operator]
        return
    got, expected = set(leaf_names(params)), set(leaf_names(trains))
    raise ShapeError(
        "these parameters are not the model's:\n"
        + "\n".join(
            [f"{name}: expected, but not there" for name in sorted(expected - got)]
            + [f"{name}: not expected" for name in sorted(got - expected)]
            or [f"expected {jax.tree.structure(trains)}, got {jax.tree.structure(params)}"]
        )
    )
