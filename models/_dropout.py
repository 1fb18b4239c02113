"""Dropout."""

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Set elements of ``x`` to 0 with probability ``rate`` and divide the rest by ``1 - rate``.

    ``key=None`` (evaluation) or a rate of 0 returns ``x`` itself.

    Law: ``E[dropout(x, rate, key)] == x`` over keys.

    Source: Srivastava et al. 2014, JMLR 15, section 4 (scaled in training, not afterwards).

    >>> import jax, jax.numpy as jnp
    >>> sorted(set(dropout(jnp.ones(64), 0.5, jax.random.key(0)).tolist()))
    [0.0, 2.0]
    """
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))
