"""The training step and the evaluation step, as pure functions."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fnml.core import ConfigError, Mean, Metrics, ShapeError, State, step_key
from fnml.train._in_place import apply_gradients

PyTree = Any
LossFn = Callable[..., tuple[jax.Array, Metrics]]
GradFn = Callable[..., tuple[tuple[jax.Array, Metrics], PyTree]]
Step = Callable[[State, PyTree], tuple[State, dict[str, Mean]]]


def _options(state: State) -> dict[str, Any]:
    """Stateful models read their state through a keyword; others never see it."""
    return {"state": state.model_state} if jax.tree.leaves(state.model_state) else {}


def _outline(value: Any) -> str:
    """Describe a nest of tuples in a few words, for a message."""
    if isinstance(value, tuple):
        return f"({', '.join(_outline(item) for item in value)})"
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"array{list(shape)}"


def _contract(out: Any) -> tuple[jax.Array, Metrics]:
    """Check what a loss function returned.

    Raises:
      ShapeError: it is not ``(loss, metrics)`` with a scalar float loss and :class:`fnml.Metrics`.
    """
    if isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], Metrics):
        shape, dtype = getattr(out[0], "shape", None), getattr(out[0], "dtype", None)
        if shape == () and dtype is not None and jnp.issubdtype(dtype, jnp.floating):
            return out
    raise ShapeError(
        "a loss function returns (loss, fnml.Metrics(weight, ...)) with the loss a scalar float, "
        f"such as mean.value; this one returns {_outline(out)}"
    )


def _named(loss: jax.Array, metrics: Metrics) -> dict[str, Mean]:
    if "loss" in metrics.values:
        raise ConfigError("a loss function's metrics cannot be named 'loss': that is the loss")
    weight = metrics.weight.astype(jnp.float32)
    # A loss is a mean of its weight; where nothing counted, whatever it is has total 0.
    total = jnp.where(weight == 0, jnp.zeros_like(weight), loss.astype(jnp.float32) * weight)
    return {"loss": Mean(total, weight), **metrics.values}


def train_step(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    *,
    momentum: float = 0.9,
    grad_norm: bool = False,
) -> Step:
    """Make a training step from a gradient function and an optimizer.

    Law: pure; the same state and batch give the same bits. The step's key is
    ``step_key(state.key, state.step)``.

    Args:
      grad_fn: ``grad_fn(params, batch, key, **options) -> ((loss, metrics), grads)``, such as
        ``jax.value_and_grad(loss_fn, has_aux=True)``, plain or transformed. If the state holds
        a ``model_state``, it gets it as ``state=``.
      optimizer: an Optax optimizer.
      momentum: how much of the model state's moving averages is kept each step:
        ``new = momentum * old + (1 - momentum) * batch``.
      grad_norm: whether to report the gradients' global norm as a metric.

    Returns:
      ``step(state, batch) -> (state, metrics)`` with ``metrics`` a dict of :class:`fnml.Mean`,
      among them ``"loss"``.

    Raises:
      ConfigError: ``momentum`` is not in ``[0, 1)``.
      ShapeError: ``grad_fn`` does not return ``((loss, metrics), grads)``, or model statistics do
        not have the model state's structure (when called).

    >>> import jax, jax.numpy as jnp, optax
    >>> def loss_fn(params, batch, key):
    ...     error = Mean.of((batch - params) ** 2)
    ...     return error.value, Metrics(error.weight)
    >>> step = train_step(jax.value_and_grad(loss_fn, has_aux=True), optax.sgd(0.5))
    >>> state = State.create(jnp.float32(0.0), optax.sgd(0.5), jax.random.key(0))
    >>> state, metrics = step(state, jnp.array([1.0, 3.0]))
    >>> float(state.params), float(metrics["loss"].value)
    (2.0, 5.0)
    """
    if not 0 <= momentum < 1:
        raise ConfigError(f"momentum is a share in [0, 1), got {momentum}")

    def step(state: State, batch: PyTree) -> tuple[State, dict[str, Mean]]:
        key = step_key(state.key, state.step)
        out = grad_fn(state.params, batch, key, **_options(state))
        if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], tuple)):
            raise ShapeError(
                "train_step takes a gradient function that returns ((loss, metrics), grads), such "
                "as jax.value_and_grad(loss_fn, has_aux=True); this one returns "
                f"{_outline(out)}"
            )
        (loss, metrics), grads = _contract(out[0]), out[1]
        params, opt_state = apply_gradients(optimizer, grads, state.opt_state, state.params)
        values = _named(loss, metrics)
        if grad_norm and "grad_norm" in values:
            raise ConfigError("the loss has a metric 'grad_norm' already: rename one of the two")
        if grad_norm:
            norm = optax.tree.norm(grads)
            values["grad_norm"] = Mean(norm.astype(jnp.float32), jnp.ones((), jnp.float32))
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            model_state=_fold(state.model_state, metrics.stats, momentum),
        )
        return new, values

    return step


def _fold(model_state: PyTree, stats: PyTree, momentum: float) -> PyTree:
    """Move the model state towards the batch's statistics."""
    structure = jax.tree.structure(model_state)
    leaves, given = jax.tree.flatten(stats, is_leaf=lambda x: isinstance(x, Mean))
    if structure != given or not all(isinstance(x, Mean) for x in leaves):  # type: ignore[operator]
        raise ShapeError(
            "the loss's metrics.stats have to mirror the model's state with a Mean for each "
            f"array: expected {structure}, got {given}"
        )

    def move(old: jax.Array, new: Mean) -> jax.Array:
        moved = old * momentum + new.value.astype(old.dtype) * (1 - momentum)
        return jnp.where(new.weight == 0, old, moved)

    return jax.tree.map(move, model_state, stats)


def eval_step(loss_fn: LossFn) -> Callable[[State, PyTree], dict[str, Mean]]:
    """Make an evaluation step: the loss and its metrics on one batch, changing nothing.

    Args:
      loss_fn: called as ``loss_fn(params, batch, None, **options)``: no key, so no random draws.

    Returns:
      ``evaluate(state, batch) -> metrics``, a dict of :class:`fnml.Mean`.
    """

    def step(state: State, batch: PyTree) -> dict[str, Mean]:
        return _named(*_contract(loss_fn(state.params, batch, None, **_options(state))))

    return step


def evaluator(
    loss_fn: LossFn, batches: Callable[[], Iterable[PyTree]]
) -> Callable[[State], Mapping[str, Mean]]:
    """Make a function that evaluates a state on every batch of a held-out set.

    Batches may differ in how much of them counts: metrics merge by weight, on the device.

    Args:
      loss_fn: see :func:`eval_step`.
      batches: returns the held-out batches, anew at each call.

    Raises:
      ConfigError: there are no batches (when called).
    """
    step = jax.jit(eval_step(loss_fn))

    def evaluate(state: State) -> Mapping[str, Mean]:
        total: dict[str, Mean] = {}
        for batch in batches():
            part = step(state, batch)
            total = {name: total[name] + mean for name, mean in part.items()} if total else part
        if not total:
            raise ConfigError("the held-out set has no batches to evaluate on")
        return total

    return evaluate
