"""Derive random keys: from names, steps and logical shards."""

import zlib

import jax

Key = jax.Array


def fold_name(key: Key, name: str) -> Key:
    """Fold a name into a key; the same name gives the same key in every process and version.

    Law: ``fold_name(key, a) == fold_name(key, b)`` only if ``crc32(a) == crc32(b)``.

    >>> import jax
    >>> a, b = (fold_name(jax.random.key(0), name) for name in ("kernel", "bias"))
    >>> bool(jax.random.key_data(a).tolist() == jax.random.key_data(b).tolist())
    False
    """
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def step_key(key: Key, step: jax.Array | int) -> Key:
    """Return the key of one training step: the run's key with the step folded in."""
    return jax.random.fold_in(key, step)


def shard_key(key: Key, shard: jax.Array | int) -> Key:
    """Return the key of one logical shard of a step's batch.

    Every layout transform derives its keys here, so that a shard draws the same numbers
    whether it is a micro-batch in time or a device in space.
    """
    return jax.random.fold_in(key, shard)
