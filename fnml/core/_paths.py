"""Name the leaves of a pytree by path, and select them by glob."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from fnml.core._errors import ConfigError, nearest

PyTree = Any


def path_name(path: tuple[Any, ...]) -> str:
    """Join a JAX key path with slashes: ``layers/attention/query``.

    >>> import jax
    >>> [(path, _)] = jax.tree.leaves_with_path({"a": [1.0]})
    >>> path_name(path)
    'a/0'
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_names(tree: PyTree) -> list[str]:
    """Return the path of every leaf, in the order of :func:`jax.tree.leaves`.

    >>> leaf_names({"b": 1, "a": {"x": 2}})
    ['a/x', 'b']
    """
    return [path_name(path) for path, _ in jax.tree.leaves_with_path(tree)]


def map_with_name(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Map ``function(name, leaf, *others)`` over the leaves of ``tree``.

    >>> map_with_name(lambda name, x: f"{name}={x}", {"a": 1})
    {'a': 'a=1'}
    """
    return jax.tree.map_with_path(lambda path, *xs: function(path_name(path), *xs), tree, *rest)


@functools.cache
def _pattern(glob: str) -> re.Pattern[str]:
    """Compile a path glob: ``*`` stays inside one segment, ``**`` spans any number of them."""
    segments = [
        ".*" if part == "**" else re.escape(part).replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
        for part in glob.split("/")
    ]
    text = "/".join(segments).replace(".*/", "(?:.*/)?")
    return re.compile(text + r"\Z", re.DOTALL)


def matches(name: str, globs: str | Sequence[str]) -> bool:
    """Tell whether a leaf's path matches any of the globs.

    >>> matches("layers/mlp/kernel", "**/kernel"), matches("kernel", "**/kernel")
    (True, True)
    >>> matches("layers/mlp/kernel", "*/kernel")
    False
    """
    globs = (globs,) if isinstance(globs, str) else globs
    return any(_pattern(glob).match(name) for glob in globs)


def mask(tree: PyTree, globs: str | Sequence[str]) -> PyTree:
    """Return a tree of booleans: which leaves match. Every glob has to match something.

    Raises:
      ConfigError: a glob matches no leaf (a typo would otherwise select nothing, silently).

    >>> mask({"w": {"kernel": 1.0}, "bias": 0.0}, "**/kernel")
    {'bias': False, 'w': {'kernel': True}}
    """
    names = leaf_names(tree)
    for glob in (globs,) if isinstance(globs, str) else globs:
        if not any(matches(name, glob) for name in names):
            raise ConfigError(
                f"the glob {glob!r} matches none of the {len(names)} parameter paths "
                f"({', '.join(names[:6])}{', ...' if len(names) > 6 else ''})."
                f"{nearest(glob, names)}"
            )
    return map_with_name(lambda name, _: matches(name, globs), tree)
