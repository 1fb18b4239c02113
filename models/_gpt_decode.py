"""Run a GPT a few tokens at a time, keeping the keys and values of what went before."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnml.core import ConfigError, ShapeError
from fnml.models._gpt import GPTConfig, embed_tokens, finish_layer, project_heads, read_logits
from fnml.models._layers import run_layers
from fnml.models._rope import rotation
from fnml.pallas_kernels import decode_attention, quantize_cache

PyTree = Any
Decode = Callable[[PyTree, PyTree, jax.Array, jax.Array | int], tuple[jax.Array, PyTree]]


def gpt_cache(config: GPTConfig, batch: int, length: int, dtype: Any = None) -> PyTree:
    """Return an empty cache for ``batch`` sequences, which remembers ``length`` tokens.

    It holds ``"key"`` and ``"value"``, [L, B, length, K, D / H], in ``dtype``: by default the
    config's, or float32. In int8 they are codes, with ``"key_scale"`` and ``"value_scale"``,
    float32 [L, B, K, length]: a quarter of float32's memory, and 4 bytes a token and head.

    Raises:
      ConfigError: ``batch`` or ``length`` is below 1, or ``dtype`` is neither floating nor int8.

    >>> gpt_cache(GPTConfig(layers=2, heads=4, kv_heads=2), batch=3, length=10)["key"].shape
    (2, 3, 10, 2, 32)
    """
    if batch < 1 or length < 1:
        raise ConfigError(f"gpt_cache got batch={batch}, length={length}: expected 1 or more")
    shape = (config.layers, batch, length, config.groups, config.head_width)
    dtype = jnp.dtype(dtype or config.dtype or jnp.float32)
    cache = {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}
    if jnp.issubdtype(dtype, jnp.floating):
        return cache
    if dtype != jnp.int8:
        raise ConfigError(f"gpt_cache got dtype={dtype}: expected floats, or int8 for codes")
    scales = (config.layers, batch, config.groups, length)
    return {**cache, "key_scale": jnp.zeros(scales), "value_scale": jnp.zeros(scales)}


def _written(old: PyTree, keys: jax.Array, values: jax.Array, slot: jax.Array) -> PyTree:
    """Put keys and values [B, t, K, D] at ``slot`` of one layer's cache, as bytes if it is bytes."""
    new = {"key": keys, "value": values}
    if old["key"].dtype == jnp.int8:
        new["key"], new["key_scale"] = quantize_cache(keys)
        new["value"], new["value_scale"] = quantize_cache(values)
    return {
        name: lax.dynamic_update_slice_in_dim(
            old[name], part.astype(old[name].dtype), slot, 2 if name.endswith("_scale") else 1
        )
        for name, part in new.items()
    }


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
    taken in another order. With a cache of int8 they differ by its rounding: half a step of
    each key's and value's scale, 1/254 of its largest number.

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
        # Once all slots are taken, a token reads every one of them, in whatever order they lie.
        lengths = jnp.broadcast_to(jnp.minimum(position + t, S), (B,))
        slot = position % S if t == 1 else position
        by = rotation(queries, config.head_width, base=config.rope_base)

        def layer(x: jax.Array, inputs: tuple[PyTree, PyTree]) -> tuple[jax.Array, PyTree]:
            params, old = inputs
            q, k, v = project_heads(config, params, x, by)
            new = _written(old, k, v, slot)
            attended = decode_attention(
                q,
                new["key"],
                new["value"],
                lengths,
                k_scale=new.get("key_scale"),
                v_scale=new.get("value_scale"),
            )
            return finish_layer(config, params, x, attended)[0], new

        x = embed_tokens(config, params, tokens)
        x, cache = run_layers(layer, x, params["layers"], cache, unroll=1)
        logits = read_logits(config, params, x)
        fits = (t == 1) | (position + t <= S)
        return jnp.where(fits, logits, jnp.nan), cache

    return decode
