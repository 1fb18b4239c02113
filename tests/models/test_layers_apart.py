import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from fnml.core import ConfigError, init
from fnml.models import GPTConfig, gpt, gpt_cache, gpt_decode

STACKED = GPTConfig(vocab=13, width=16, layers=3, heads=4, kv_heads=2, context=24, dropout=0.2)
TOKENS = jax.random.randint(jax.random.key(1), (2, 24), 0, 13)


def cut(config, params):
    """Cut the stacked layers apart."""
    layers = [jax.tree.map(operator.itemgetter(i), params["layers"]) for i in range(config.layers)]
    return params | {"layers": layers}


def close(got, want):
    # XLA fuses across layers where it sees them, so roundings differ, by a few per number.
    one, other = ravel_pytree(got)[0], ravel_pytree(want)[0]
    assert jnp.linalg.norm(one - other) <= 1e-5 * jnp.linalg.norm(other)


@pytest.mark.parametrize("experts", [None, 4])
def test_a_gpt_computes_the_same_with_its_layers_apart(experts):
    config = dataclasses.replace(STACKED, experts=experts)
    params = init(gpt(config).spec, jax.random.key(0))

    def run(config, params):
        model = gpt(config)
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda p: p.shape, model.spec)

        def loss(params):
            options = {} if experts is None else {"balance": True}
            out = model.apply(params, TOKENS, key=jax.random.key(2), **options)
            logits, balance = (out, 0.0) if experts is None else (out[0], out[1].value)
            return jnp.sum(logits * jnp.cos(logits)) + balance, out

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    grads, out = run(config, params)
    found = run(dataclasses.replace(config, stacked=False), cut(config, params))
    close(found[0], cut(config, grads))
    close(found[1], out)


def test_layers_apart_are_traced_and_differentiated_once():
    traced = {"forward": 0, "backward": 0}

    @jax.custom_vjp
    def attention(q, k, v):
        traced["forward"] += 1
        return q + k + v

    def forward(q, k, v):
        return attention(q, k, v), None

    def backward(_, grad):
        traced["backward"] += 1
        return grad, grad, grad

    attention.defvjp(forward, backward)
    config = dataclasses.replace(STACKED, dropout=0.0, kv_heads=4, stacked=False)
    model = gpt(config, attention=attention)
    params = init(model.spec, jax.random.key(0))
    jax.jit(jax.grad(lambda params: model.apply(params, TOKENS).sum())).lower(params)
    assert traced["backward"] == 1
    assert traced["forward"] <= 2  # as it is, and as its derivative calls it


def test_a_gpt_with_its_layers_apart_decodes_as_it_applies():
    config = dataclasses.replace(STACKED, dropout=0.0, stacked=False)
    params = init(gpt(config).spec, jax.random.key(0))
    first, second, _ = params["layers"]
    assert not np.allclose(first["mlp"]["up"], second["mlp"]["up"])
    decode, cache = jax.jit(gpt_decode(config)), gpt_cache(config, 2, 24)
    prompt, cache = decode(params, cache, TOKENS[:, :10], 0)
    rest, _ = decode(params, cache, TOKENS[:, 10:], 10)
    # Sums over keys are taken in another order.
    close(jnp.concatenate([prompt, rest], 1), gpt(config).apply(params, TOKENS))


def test_what_runs_layers_elsewhere_takes_a_stack():
    with pytest.raises(ConfigError, match="stacked=False"):
        gpt(dataclasses.replace(STACKED, stacked=False), layers=lambda layer: layer)
