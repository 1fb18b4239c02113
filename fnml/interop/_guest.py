"""What guests of every library have in common."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnml.core import ConfigError, Mean, Param, ShapeError, abstract, path_name

PyTree = Any
Flags = Callable[[bool], Mapping[str, Any]]

_TRAINING = ("train", "training", "is_training")
_EVALUATING = ("deterministic", "use_running_average")


def read_flags(module: Any, function: Callable[..., Any]) -> Flags:
    """Find the keywords by which ``function`` is told whether it trains.

    A keyword that the module has fixed as an attribute is left alone.
    """
    free = [
        name
        for name in inspect.signature(function).parameters
        if name in (*_TRAINING, *_EVALUATING) and getattr(module, name, None) is None
    ]
    return lambda train: {name: train if name in _TRAINING else not train for name in free}


def axis_names(names: Any, rank: int) -> tuple[str | None, ...]:
    """Turn partitioning metadata into the axis names of a :class:`fnml.Param`.

    A dimension laid over several mesh axes is named by all of them: ``"data,model"``.

    >>> axis_names(("embed", ("data", "model")), 3)
    ('embed', 'data,model', None)
    """
    given = [n if n is None or isinstance(n, str) else ",".join(n) for n in names or ()]
    return tuple((given + [None] * rank)[:rank])


def check_state(spec: PyTree, what: str) -> None:
    """Refuse state that a step cannot fold, because it is no floating-point number.

    Raises:
      ConfigError: all such arrays, by path.
    """
    faults = [
        f"{path_name(path)}: {jnp.dtype(p.dtype)}{list(p.shape)}"
        for path, p in jax.tree.leaves_with_path(spec)
        if not jnp.issubdtype(p.dtype, jnp.floating)
    ]
    if faults:
        raise ConfigError(
            f"{what} keeps state that is no floating-point number, which a training step cannot "
            "merge over shards: " + ", ".join(faults) + ". Pass such values as inputs instead"
        )


def given_state(spec: PyTree, state: PyTree, what: str) -> PyTree:
    """Return the state an ``apply`` was given, if it is the one that the model has.

    Raises:
      ShapeError: its structure is not the spec's.
    """
    expected, got = jax.tree.structure(spec), jax.tree.structure(state)
    if expected != got:  # type: ignore[operator]
        raise ShapeError(
            f"{what} has state like {expected}, but was called with {got}: pass "
            "state=fnml.init(model.state, key), or a State's model_state"
        )
    return state


def written(updated: PyTree) -> PyTree:
    """Return the state that a forward pass wrote, as statistics of weight 1 per shard."""

    def one(value: jax.Array) -> Mean:
        value = lax.stop_gradient(value)
        return Mean(value, jnp.ones_like(value))

    return jax.tree.map(one, updated)


def check_values(spec: PyTree, values: PyTree, what: str) -> None:
    """Refuse parameters or state that do not fit their description.

    Raises:
      ShapeError: all differences, by path.
    """

    def table(tree: PyTree) -> dict[str, str]:
        return {
            path_name(path): f"{x.dtype}{list(x.shape)}"
            for path, x in jax.tree.leaves_with_path(tree)
        }

    expected, got = table(abstract(spec)), table(values)
    faults = [
        f"{name}: expected {expected.get(name, 'nothing')}, got {got.get(name, 'nothing')}"
        for name in sorted(expected.keys() | got.keys())
        if expected.get(name) != got.get(name)
    ]
    if faults:
        raise ShapeError(f"these {what} are not the model's:\n" + "\n".join(faults))


def describe(values: Any) -> str:
    """List the shapes of a call's inputs, for messages.

    >>> describe((jnp.ones((2, 3)), 1.0))
    'float32[2, 3], float'
    """
    return ", ".join(
        f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else type(x).__name__
        for x in jax.tree.leaves(values)
    )


def make_param(array: Any, names: Any, init: Any) -> Param:
    """Describe a guest's array."""
    return Param(tuple(array.shape), axis_names(names, len(array.shape)), init, array.dtype)
