"""Run a GPT a few tokens at a time, keeping the keys and values of what went before."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnml.core import ConfigError, ShapeError
from fnml.models._gpt import GPTConfig, embed_tokens, finish_layer, project_heads, read_logits
from fnml.models._rope import rotation
from fnml.models._wide import wide

PyTree = Any
Decode = Callable[[PyTree, PyTree, jax.Array, jax.Array | int], tuple[jax.Array, PyTree]]


def gpt_cache(config: GPTConfig, batch: int, length: int, dtype: Any = None) -> PyTree:
    """Return an empty cache for ``batch`` sequences, which remembers ``length`` tokens.

    It holds ``"key"`` and ``"value"``, [L, B, length, K, D / H], in ``dtype``: by default the
    config's, or float32.

    Raises:
      ConfigError: ``batch`` or ``length`` is below 1.

    >>> gpt_cache(GPTConfig(layers=2, heads=4, kv_heads=2), batch=3, length=10)["key"].shape
    (2, 3, 10, 2, 32)
    """
    if batch < 1 or length < 1:
        raise ConfigError(f"gpt_cache got batch={batch}, length={length}: expected 1 or more")
    shape = (config.layers, batch, length, config.groups, config.head_width)
    dtype = dtype or config.dtype or jnp.float32
    return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """Attend from q [B, t, H, D] to a cache k, v [B, S, K, D], where seen [t, S] says so."""
    B, t, H, D = q.shape
    K, sums = k.shape[2], wide(q.dtype)
    q = q.reshape(B, t, K, H // K, D) * D**-0.5
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=sums)
    weights = jax.nn.softmax(jnp.where(seen[None, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkgts,bskd->btkgd", weights.astype(v.dtype), v).reshape(B, t, H, D)


def gpt_decode(config: GPTConfig) -> Decode:
    """Build ``decode(params, cache, tokens, position) -> (logits, cache)``.

    ``tokens`` [B, t] stand at ``position``, ..., ``position + t - 1`` of their sequences, and
    everything before has been decoded into ``cache``, which remembers S tokens. ``position`` is
    an int and may be traced. Logits are [B, t, V], at least float32. A prompt is decoded in one
    call (t > 1), or in several; then one token per call.

    Once S tokens are full, one-token calls replace the oldest: each token reads the last S.
    Several tokens at once that would reach beyond S give NaN, as they cannot replace what they
    still have to read.

    Law: while position + t <= S, the logits equal those of ``apply`` on the whole sequence,
    however it is cut into calls; to 1e-5 of their norm in float32, as the sums over keys are
    taken in another order.

    Raises:
      ShapeError: ``tokens`` are not [B, t] of the cache's batch, or more than it holds.

    >>> import jax, jax.numpy as jnp
    >>> from fnml.core import init
    >>> from fnml.models import gpt
    >>> config = GPTConfig(vocab=11, width=8, layers=2, heads=2, context=16)
    >>> params = init(gpt(config).spec, jax.random.key(0))
    >>> decode, cache = gpt_decode(config), gpt_cache(config, batch=1, length=16)
    >>> logits, cache = decode(params, cache, jnp.array([[3, 1, 4]]), 0)
    >>> logits, cache = decode(params, cache, jnp.array([[1]]), 3)
    >>> logits.shape
    (1, 1, 11)
    """

    def decode(
        params: PyTree, cache: PyTree, tokens: jax.Array, position: jax.Array | int
    ) -> tuple[jax.Array, PyTree]:
        _, B, S, _, _ = cache["key"].shape
        if tokens.ndim != 2 or tokens.shape[0] != B or tokens.shape[1] > S:
            raise ShapeError(
                f"decode got tokens {tokens.shape} for a cache of {B} sequences of {S} tokens: "
                f"expected [{B}, t] with t up to {S}"
            )
        t = tokens.shape[1]
        position = jnp.asarray(position, jnp.int32)
        queries = position + jnp.arange(t)  # [t]
        # Slot s holds the latest position that is s modulo S; below 0 it was never written.
        last = position + t - 1
        keys = last - (last - jnp.arange(S)) % S  # [S]
        seen = (keys[None, :] >= 0) & (keys[None, :] <= queries[:, None])  # [t, S]
        slot = position % S if t == 1 else position
        by = rotation(queries, config.head_width, base=config.rope_base)

        def layer(x: jax.Array, inputs: tuple[PyTree, PyTree]) -> tuple[jax.Array, PyTree]:
            params, old = inputs
            q, k, v = project_heads(config, params, x, by)
            new = {
                name: lax.dynamic_update_slice_in_dim(
                    old[name], part.astype(old[name].dtype), slot, 1
                )
                for name, part in (("key", k), ("value", v))
            }  # [B, S, K, D / H]
            attended = _attend(q, new["key"].astype(q.dtype), new["value"].astype(q.dtype), seen)
            return finish_layer(config, params, x, attended), new

        x = embed_tokens(config, params, tokens)
        x, cache = lax.scan(layer, x, (params["layers"], cache))
        logits = read_logits(config, params, x)
        fits = (t == 1) | (position + t <= S)
        return jnp.where(fits, logits, jnp.nan), cache

    return decode
