"""Name the arguments of a function that is exported, and make some of their sizes symbolic."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from fnml.core import ConfigError, leaf_names, matches, nearest

PyTree = Any


def argument_names(function: Callable[..., Any], args: tuple[Any, ...], skip: int) -> list[str]:
    """Return a name for every leaf: the parameter's, and the path below it.

    Args:
      function: whose parameters they are.
      args: what is passed for its parameters from number ``skip`` on.
      skip: how many come before.

    >>> argument_names(lambda params, tokens, cache: 0, (1, {"k": 2, "v": 3}), 1)
    ['tokens', 'cache/k', 'cache/v']
    """
    names: list[str] = []
    for own, arg in zip(_parameters(function, skip + len(args))[skip:], args, strict=True):
        names += ["/".join(part for part in (own, leaf) if part) for leaf in leaf_names(arg)]
    return names


def _parameters(function: Callable[..., Any], count: int) -> list[str]:
    kinds = inspect.Parameter
    try:
        found = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        found = []
    names: list[str] = []
    for parameter in found:
        if parameter.kind is kinds.VAR_POSITIONAL:
            names += [f"{parameter.name}/{i}" for i in range(count - len(names))]
        elif parameter.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return [*names, *(f"input/{i}" for i in range(len(names), count))][:count]


def abstract_args(
    args: tuple[Any, ...], names: Sequence[str], dynamic: Any, constraints: Sequence[str]
) -> tuple[Any, ...]:
    """Return the arguments' shapes and dtypes, with symbolic dimensions where ``dynamic`` has them.

    Raises:
      ConfigError: ``dynamic`` names no input, or a description does not fit its array; all listed.
    """
    leaves, tree = jax.tree.flatten(args)
    shaped = [_abstract(leaf, name) for leaf, name in zip(leaves, names, strict=True)]
    if dynamic is None:
        return jax.tree.unflatten(tree, shaped)
    texts = _by_name(dynamic, names) if isinstance(dynamic, Mapping) else _by_prefix(dynamic, args)
    scope = jax.export.SymbolicScope(tuple(constraints))
    faults: list[str] = []
    result = []
    for name, leaf, text in zip(names, shaped, texts, strict=True):
        if text is not None:
            try:
                shape = jax.export.symbolic_shape(text, like=leaf.shape, scope=scope)
                if len(shape) != len(leaf.shape):
                    raise ValueError(f"it has {len(shape)} axes, not {len(leaf.shape)}")
                leaf = jax.ShapeDtypeStruct(shape, leaf.dtype)
            except ValueError as error:
                faults.append(f"{name}: {text!r} for an array {list(leaf.shape)}: {error}")
        result.append(leaf)
    if faults:
        raise ConfigError("these dynamic shapes do not fit:\n" + "\n".join(faults))
    return jax.tree.unflatten(tree, result)


def _abstract(leaf: Any, name: str) -> jax.ShapeDtypeStruct:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return jax.ShapeDtypeStruct(
            leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True)
        )
    if isinstance(leaf, bool | int | float):
        return jax.eval_shape(lambda: jax.numpy.asarray(leaf))
    raise ConfigError(
        f"{name}: expected an array, a ShapeDtypeStruct or a number, got {type(leaf).__name__}"
    )


def _by_name(dynamic: Mapping[str, str], names: Sequence[str]) -> list[str | None]:
    """Give each input the text of the first key that is its name, lies above it, or matches it."""
    for key in dynamic:
        if not any(_covers(key, name) for name in names):
            raise ConfigError(
                f"dynamic names {key!r}, and the inputs are {', '.join(names) or 'none'}."
                f"{nearest(key, names)}"
            )
    return [next((t for k, t in dynamic.items() if _covers(k, name)), None) for name in names]


def _covers(key: str, name: str) -> bool:
    return name == key or name.startswith(f"{key}/") or matches(name, key)


def _by_prefix(dynamic: Any, args: tuple[Any, ...]) -> list[str | None]:
    def is_leaf(x: Any) -> bool:
        return x is None or isinstance(x, str)

    try:
        whole = jax.tree.broadcast(dynamic, args, is_leaf=is_leaf)
    except ValueError as error:
        raise ConfigError(f"dynamic is no prefix of the arguments: {error}") from error
    return jax.tree.leaves(whole, is_leaf=is_leaf)
