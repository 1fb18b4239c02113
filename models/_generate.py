"""Continue a prompt."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnml.core import ConfigError, ShapeError
from fnml.models._gpt import GPTConfig
from fnml.models._gpt_decode import gpt_cache, gpt_decode

PyTree = Any


def _sample(
    logits: jax.Array, key: jax.Array, temperature: jax.Array, top_k: int | None
) -> jax.Array:
    """Draw one token for each row of logits [B, V]; temperature 0 takes the likeliest."""
    greedy = jnp.argmax(logits, axis=-1)
    if top_k is not None:
        least = lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    heat = jnp.where(temperature > 0, temperature, jnp.ones_like(temperature))
    drawn = jax.random.categorical(key, logits / heat, axis=-1)
    return jnp.where(temperature > 0, drawn, greedy)


@functools.partial(jax.jit, static_argnames=("config", "length", "top_k"))
def _generate(
    config: GPTConfig,
    params: PyTree,
    prompt: jax.Array,
    length: int,
    key: jax.Array,
    temperature: jax.Array,
    top_k: int | None,
) -> jax.Array:
    B, P = prompt.shape
    decode = gpt_decode(config)
    dtype = config.dtype or params["embed"]["table"].dtype
    cache = gpt_cache(config, B, min(P + length, config.context), dtype)
    logits, cache = decode(params, cache, prompt, 0)

    def step(carry: tuple[jax.Array, PyTree], i: jax.Array) -> tuple[Any, jax.Array]:
        logits, cache = carry
        token = _sample(logits, jax.random.fold_in(key, i), temperature, top_k)
        token = token.astype(prompt.dtype)
        logits, cache = decode(params, cache, token[:, None], P + i)
        return (logits[:, -1], cache), token

    _, tokens = lax.scan(step, (logits[:, -1], cache), jnp.arange(length))
    return jnp.concatenate([prompt, tokens.T], axis=1)


def generate(
    config: GPTConfig,
    params: PyTree,
    prompt: jax.Array,
    length: int,
    key: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> jax.Array:
    """Return ``prompt`` [B, P] followed by ``length`` sampled tokens, [B, P + length].

    One compiled call: the prompt at once, then a scan of one-token steps. Beyond ``context``
    tokens, each reads the last ``context``.

    Args:
      config: the model's description.
      params: its parameters.
      prompt: int tokens.
      length: how many tokens to add.
      key: the typed key of the draws; token i uses ``fold_in(key, i)``.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: how many of the likeliest tokens to draw from; ``None`` for all.

    Law: with temperature 0 (or ``top_k=1``), while P + length <= context, every added token is
    the argmax of ``apply`` on what stands before it, but for ties to rounding.

    Raises:
      ShapeError: ``prompt`` is not [B, P] with 1 <= P <= context.
      ConfigError: ``length``, ``temperature`` or ``top_k`` is out of range.

    >>> import jax, jax.numpy as jnp
    >>> from fnml.core import init
    >>> from fnml.models import gpt
    >>> config = GPTConfig(vocab=11, width=8, layers=2, heads=2, context=16)
    >>> params = init(gpt(config).spec, jax.random.key(0))
    >>> generate(config, params, jnp.array([[3, 1, 4]]), 20, jax.random.key(1)).shape
    (1, 23)
    """
    if prompt.ndim != 2 or not 1 <= prompt.shape[1] <= config.context:
        raise ShapeError(
            f"generate got a prompt {prompt.shape}: expected [B, P] with P from 1 to "
            f"context={config.context}"
        )
    faults = []
    if length < 1:
        faults.append(f"length={length}: expected 1 or more")
    if not temperature >= 0:
        faults.append(f"temperature={temperature}: expected 0 or more")
    if top_k is not None and not 1 <= top_k <= config.vocab:
        faults.append(f"top_k={top_k}: expected 1 to vocab={config.vocab}, or None")
    if faults:
        raise ConfigError("generate: " + "; ".join(faults))
    heat = jnp.asarray(temperature, jnp.float32)
    return _generate(config, params, prompt, length, key, heat, top_k)
