"""Say which parameters train, in the spec itself."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import jax
from jax import lax

from fnml.core import Model, Param, mask
from fnml.transforms._edited import Edited, FrozenParam, is_float, opened

PyTree = Any


def freeze(model: Model, targets: str | Sequence[str] = "**") -> Model:
    """Mark parameters as not training.

    What trains is part of the model's description: a frozen parameter is a :class:`FrozenParam`
    in the spec, as the base of :func:`lora` and everything :func:`quantize` stores are. Three
    readers act on it::

        grad_fn = trainable_value_and_grad(loss_fn, model)  # for jax.value_and_grad(loss_fn, ...)
        optimizer = train_only(optax.adamw(1e-3), model)
        state = State.create(params, optimizer, key)

    Frozen parameters stay in ``State.params``. Closing over them instead would build them into
    every compiled program as constants; here they are arguments, donated and handed on in place,
    they are sharded and cast with the rest, and a checkpoint holds the whole model.

    Laws: ``freeze(m).apply`` has the bits of ``m.apply``. After any number of steps frozen
    parameters have the bits they started with. The optimizer's state is that of the trained
    parameters alone. Gradients of frozen parameters, should ``jax.grad`` be used, are exactly 0.

    Args:
      targets: path globs of the parameters to freeze, by default all.

    Raises:
      ConfigError: a glob matches no parameter.

    >>> from fnml.core import init
    >>> from fnml.models import MLPConfig, mlp
    >>> model = freeze(mlp(MLPConfig(inputs=4, hidden=(8,), outputs=2)), "hidden/**")
    >>> trainable(model)["head"], trainable(model)["hidden"]
    ({'bias': True, 'kernel': True}, [{'bias': False, 'kernel': False}])
    """
    chosen = mask(model.spec, targets)
    spec = jax.tree.map(lambda p, hit: frozen_param(p) if hit else p, model.spec, chosen)
    inner = opened(model)

    def weights(params: PyTree, key: jax.Array | None) -> PyTree:
        held = jax.tree.map(lambda x, hit: hold(x) if hit else x, params, chosen)
        return inner.weights(held, key)

    names = (*inner.names, "freeze")
    return Model(spec, Edited(inner.root, weights, inner.store, names), model.state)


def trainable(model: Model) -> PyTree:
    """Return a tree of booleans like the model's parameters: which of them train.

    >>> import jax.numpy as jnp
    >>> zeros = jax.nn.initializers.zeros
    >>> model = Model({"w": Param((2,), (None,), zeros)}, lambda params, x: x * params["w"])
    >>> trainable(model), trainable(freeze(model))
    ({'w': True}, {'w': False})
    """
    return jax.tree.map(lambda p: not isinstance(p, FrozenParam), model.spec)


def frozen_param(param: Param) -> Param:
    """Return the description of the same array, frozen."""
    if isinstance(param, FrozenParam):
        return param
    return FrozenParam(*(getattr(param, field.name) for field in fields(Param)))


def hold(x: jax.Array) -> jax.Array:
    """Stop the gradient of a float; other arrays have none."""
    return lax.stop_gradient(x) if is_float(x) else x
