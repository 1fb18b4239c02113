"""States to save, and a comparison of trees bit by bit that shares nothing with the library."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnml.core import State


def raw(leaf):
    key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if key else leaf)


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        where = jax.tree_util.keystr(path)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), where
        assert raw(a).tobytes() == raw(b).tobytes(), where


def adamw_state(seed=0, impl="threefry2x32", model_state=()):
    """A training state in which no array is all zeros."""
    params = {
        "dense": {"kernel": jax.random.normal(jax.random.key(seed), (8, 16)), "bias": jnp.ones(16)},
        "half": [jax.random.normal(jax.random.key(seed + 1), (5, 3), jnp.bfloat16)],
        "scale": jnp.float32(1.5),
        "nothing": {},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    key = jax.random.key(seed, impl=impl)
    state = State.create(params, optimizer, key, model_state)
    moments = jax.tree.map(lambda x: x + jnp.asarray(3, x.dtype), state.opt_state)
    return dataclasses.replace(state, step=jnp.int32(seed), opt_state=moments)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
