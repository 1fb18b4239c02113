"""Call a user's loss, and refuse what is none."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnml.core import ConfigError, FnmlError, Metrics

PyTree = Any
LossFn = Callable[..., tuple[jax.Array, Metrics]]


def on_device(tree: PyTree) -> PyTree:
    """Turn host arrays and numbers into what ``jax.jit`` would make of them."""
    return jax.tree.map(jnp.asarray, tree)


def name_of(loss_fn: Any) -> str:
    """Return what a loss function is called in messages."""
    return getattr(loss_fn, "__name__", type(loss_fn).__name__)


def check_signature(
    loss_fn: LossFn, params: PyTree, batch: PyTree, key: Any, **options: Any
) -> Any:
    """Trace the loss; return its jaxpr.

    Raises:
      ConfigError: it cannot be called as ``loss_fn(params, batch, key)``, or does not return a
        float scalar and :class:`fnml.Metrics`.
    """
    what = name_of(loss_fn)
    try:
        closed, out = jax.make_jaxpr(
            lambda p, b, k: loss_fn(p, b, k, **options), return_shape=True
        )(params, batch, key)
    except FnmlError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"{what}(params, batch, key) fails on the example: {type(error).__name__}: {reason}"
        ) from error
    good = isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], Metrics)
    if not good:
        got = [type(x).__name__ for x in out] if isinstance(out, tuple) else type(out).__name__
        raise ConfigError(
            f"{what} has to return (loss, fnml.Metrics), got {got}: see fnml.Metrics for the "
            "weight that the loss is a mean over"
        )
    loss, metrics = out
    shape, weight = getattr(loss, "shape", None), getattr(metrics.weight, "shape", None)
    floating = shape == () and jnp.issubdtype(loss.dtype, jnp.floating)
    if not floating or weight != ():
        raise ConfigError(
            f"{what} has to return a float scalar and metrics whose weight is a scalar, got loss "
            f"{loss} and weight {metrics.weight}"
        )
    return closed
