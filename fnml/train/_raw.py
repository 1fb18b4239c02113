"""States as plain arrays, few of them, which compiled calls take several times faster."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any
_WORDS = (jnp.int32, jnp.uint32)


def is_key(x: Any) -> bool:
    """Tell a typed key array from numbers."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


class Raw(NamedTuple):
    """A way between a tree and the same numbers with its counters and keys in one array.

    JAX dispatches a call with a typed key among its arguments through Python, and every further
    array costs about a microsecond; both are a good part of a small model's step. Only whole
    32-bit words move, so no operation on floating-point numbers is compiled differently.

    Attributes:
      structure: the tree's structure.
      kinds: for each leaf ``None`` if it is kept, else its dtype, and for a typed key the name of
        its implementation.
      shapes: the shapes of the leaves, for keys those of their integers.
    """

    structure: Any
    kinds: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(tree: PyTree) -> "Raw":
        """Describe a tree of arrays.

        >>> import jax, jax.numpy as jnp
        >>> tree = {"key": jax.random.key(7), "step": jnp.int32(3), "w": jnp.ones(2)}
        >>> raw = Raw.of(tree)
        >>> kept, words = raw.strip(tree)
        >>> len(kept), words.tolist(), int(raw.dress((kept, words))["step"])
        (1, [0, 7, 3], 3)
        """
        leaves, structure = jax.tree.flatten(tree)
        plain = [jax.random.key_data(x) if is_key(x) else x for x in leaves]
        kinds = tuple(
            str(jax.random.key_impl(leaf))
            if is_key(leaf)
            else (x.dtype if x.ndim == 0 and x.dtype in _WORDS else None)
            for leaf, x in zip(leaves, plain, strict=True)
        )
        return Raw(structure, kinds, tuple(x.shape for x in plain))

    def strip(self, tree: PyTree) -> tuple[list[jax.Array], jax.Array]:
        """Return what is kept, and the words of all the rest: uint32 ``[W]``."""
        kept, words = [], [jnp.zeros(0, jnp.uint32)]
        for x, kind in zip(self.structure.flatten_up_to(tree), self.kinds, strict=True):
            if kind is None:
                kept.append(x)
            else:
                data = jax.random.key_data(x) if isinstance(kind, str) else x
                words.append(jax.lax.bitcast_convert_type(data, jnp.uint32).reshape(-1))
        return kept, jnp.concatenate(words)

    def dress(self, plain: tuple[list[jax.Array], jax.Array]) -> PyTree:
        """Turn what :meth:`strip` returned back into the tree."""
        kept, words = iter(plain[0]), plain[1]
        leaves, at = [], 0
        for kind, shape in zip(self.kinds, self.shapes, strict=True):
            if kind is None:
                leaves.append(next(kept))
                continue
            data = words[at : at + math.prod(shape)].reshape(shape)
            at += math.prod(shape)
            if isinstance(kind, str):
                leaves.append(jax.random.wrap_key_data(data, impl=kind))
            else:
                leaves.append(jax.lax.bitcast_convert_type(data, kind))
        return jax.tree.unflatten(self.structure, leaves)
