"""States without typed keys, which compiled calls take several times faster."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any


def is_key(x: Any) -> bool:
    """Tell a typed key array from numbers."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


class Raw(NamedTuple):
    """A way between a tree with typed keys and the same tree with their plain integers.

    JAX dispatches a call with a typed key among its arguments through Python, which costs a small
    model a good part of its step; with plain arrays it goes through C++.

    Attributes:
      structure: the tree's structure.
      kinds: for each leaf the name of the key's implementation, ``None`` for what is no key.
    """

    structure: Any
    kinds: tuple[str | None, ...]

    @staticmethod
    def of(tree: PyTree) -> "Raw":
        """Describe a tree of arrays.

        >>> import jax
        >>> raw = Raw.of({"key": jax.random.key(0)})
        >>> raw.strip({"key": jax.random.key(7)})["key"].tolist()
        [0, 7]
        """
        leaves, structure = jax.tree.flatten(tree)
        kinds = tuple(str(jax.random.key_impl(x)) if is_key(x) else None for x in leaves)
        return Raw(structure, kinds)

    def strip(self, tree: PyTree) -> PyTree:
        """Replace typed keys by their integers."""
        leaves = self.structure.flatten_up_to(tree)
        plain = [
            x if kind is None else jax.random.key_data(x)
            for x, kind in zip(leaves, self.kinds, strict=True)
        ]
        return jax.tree.unflatten(self.structure, plain)

    def dress(self, tree: PyTree) -> PyTree:
        """Turn the integers back into typed keys."""
        leaves = self.structure.flatten_up_to(tree)
        typed = [
            x if kind is None else jax.random.wrap_key_data(x, impl=kind)
            for x, kind in zip(leaves, self.kinds, strict=True)
        ]
        return jax.tree.unflatten(self.structure, typed)
