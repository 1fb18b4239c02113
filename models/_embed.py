"""Look up the vectors of tokens."""

import jax
import jax.numpy as jnp

from fnml.core import ShapeError


def embed(tokens: jax.Array, table: jax.Array) -> jax.Array:
    """Return ``table[tokens]``: int ``tokens`` of any shape, ``table`` [V, D], out [..., D].

    A token outside of [0, V) gives NaN, not the vector of another token: negative numbers do
    not count from the end, so a padding value of -1 cannot pass unnoticed.

    Raises:
      ShapeError: ``tokens`` are no integers, or ``table`` is not [V, D].

    >>> import jax.numpy as jnp
    >>> embed(jnp.array([[2, 0]]), jnp.arange(6.0).reshape(3, 2)).tolist()
    [[[4.0, 5.0], [0.0, 1.0]]]
    """
    if not jnp.issubdtype(tokens.dtype, jnp.integer) or table.ndim != 2:
        raise ShapeError(
            f"embed got tokens {tokens.dtype} {tokens.shape} and a table {table.shape}: "
            "expected integers [...] and a table [V, D]"
        )
    return table.at[tokens].get(mode="fill", wrap_negative_indices=False)
