"""Average the parameters over training, as explicit state."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fnml.core import ConfigError, State

PyTree = Any


class EmaState(NamedTuple):
    """The optimizer state of :func:`ema`.

    Attributes:
      steps: int32 scalar, the number of updates averaged.
      average: the parameters' average, float32 where they are narrower; read it with
        :func:`ema_params`.
      inner: the inner optimizer's state.
    """

    steps: jax.Array
    average: PyTree
    inner: PyTree


def ema(
    optimizer: optax.GradientTransformation, decay: float, *, debias: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Keep an exponential moving average of the parameters beside the optimizer's state.

    The average is part of ``State.opt_state``, so it is saved, resumed, fused and skipped with
    everything else; training itself does not see it. Read it with :func:`ema_params`.

    Law: after ``t`` updates with parameters ``p_1 .. p_t`` the average is
    ``sum_i (1 - decay) * decay**(t - i) * p_i / (1 - decay**t)`` to rounding; without ``debias``
    it is ``decay**t * p_0 + sum_i (1 - decay) * decay**(t - i) * p_i``. The updates are the inner
    optimizer's, bit for bit.

    It is kept in the form ``a += gain_t * (p_t - a)`` with ``gain_t = (1 - decay) / (1 -
    decay**t)``: the same average, but nothing is lost to rounding when the parameters stand still.

    Source: Polyak and Juditsky 1992 (averaging); Kingma and Ba 2015, arXiv:1412.6980, section 3
    (the bias correction).

    Args:
      optimizer: an Optax optimizer.
      decay: the share of the average that an update keeps, in (0, 1).
      debias: whether the starting point has no weight.

    Raises:
      ConfigError: ``decay`` is not in (0, 1); ``optimizer`` is averaged already (in ``init``); or
        ``update`` is called without parameters.

    >>> import jax.numpy as jnp, optax
    >>> optimizer = ema(optax.sgd(1.0), 0.5)
    >>> state = optimizer.init(jnp.float32(3.0))
    >>> _, state = optimizer.update(jnp.float32(1.0), state, jnp.float32(3.0))
    >>> _, state = optimizer.update(jnp.float32(1.0), state, jnp.float32(2.0))
    >>> round(float(state.average), 4)  # of 2 and 1, which counts twice as much
    1.3333
    """
    if not 0 < decay < 1:
        raise ConfigError(f"ema's decay is a share in (0, 1), got {decay}")
    inner = optax.with_extra_args_support(optimizer)

    def gain(steps: jax.Array) -> jax.Array:
        if not debias:
            return jnp.full((), 1 - decay, jnp.float32)
        # 1 - decay**t without the cancellation, which for small t would leave three digits.
        return (1 - decay) / -jnp.expm1(steps.astype(jnp.float32) * math.log(decay))

    def init(params: PyTree) -> EmaState:
        average = jax.tree.map(lambda p: p.astype(_wide(p)), params)
        state = inner.init(params)
        leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, EmaState))
        if any(isinstance(leaf, EmaState) for leaf in leaves):
            raise ConfigError(
                "the optimizer averages the parameters already, and which average ema_params should "
                "return would be a guess: apply ema once"
            )
        return EmaState(jnp.zeros((), jnp.int32), average, state)

    def update(
        grads: PyTree, state: EmaState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, EmaState]:
        if params is None:
            raise ConfigError("ema averages parameters: call update(grads, state, params)")
        updates, inner_state = inner.update(grads, state.inner, params, **extra)
        steps = state.steps + 1
        share = gain(steps)

        def move(average: jax.Array, p: jax.Array) -> jax.Array:
            return average + share.astype(average.dtype) * (p.astype(average.dtype) - average)

        new = optax.apply_updates(params, updates)
        return updates, EmaState(steps, jax.tree.map(move, state.average, new), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def ema_params(state: State) -> PyTree:
    """Return the averaged parameters, with the dtypes of ``state.params``.

    The average is found wherever in ``state.opt_state`` it is: inside ``optax.chain``, under
    :func:`loss_scaling`. Before the first update it is the starting point.

    Raises:
      ConfigError: the optimizer keeps no average, or more than one.

    >>> import jax, jax.numpy as jnp, optax
    >>> state = State.create({"w": jnp.ones(2)}, ema(optax.sgd(0.1), 0.9), jax.random.key(0))
    >>> ema_params(state)["w"].tolist()
    [1.0, 1.0]
    """
    leaves = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, EmaState))
    found = [leaf for leaf in leaves if isinstance(leaf, EmaState)]
    if len(found) != 1:
        raise ConfigError(
            f"the optimizer's state holds {len(found)} averages of the parameters, expected 1: "
            "train with ema(optimizer, decay), applied once"
        )
    return jax.tree.map(lambda a, p: a.astype(p.dtype), found[0].average, state.params)


def _wide(p: jax.Array) -> Any:
    return jnp.float32 if jnp.dtype(p.dtype).itemsize < 4 else p.dtype
