"""One hash for a whole tree of arrays."""

import hashlib
import json
from typing import Any

import numpy as np

from fnml.checkpoint._tree import describe, named_leaves, to_host

PyTree = Any


def tree_sha256(tree: PyTree) -> str:
    """Hash every leaf's path, dtype, shape and bytes; typed keys through their key data.

    Law: two trees have one hash if and only if they hold the same bits under the same paths
    (barring a collision of SHA-256): whatever the order, the containers, the devices and the
    sharding.

    Args:
      tree: a tree of JAX or NumPy arrays.

    Returns:
      64 hexadecimal digits.

    Raises:
      ShapeError: a leaf is no array, or two leaves have the same path.

    >>> import jax.numpy as jnp
    >>> tree_sha256({"w": jnp.zeros(3), "b": jnp.ones(())})[:16]
    'bfd4588f46fec7ab'
    """
    leaves = named_leaves(tree)
    digest = hashlib.sha256()
    for name, leaf in sorted(describe(leaves).items()):
        # JSON delimits the parts, and the shape fixes how many bytes follow: no two trees run
        # together into the same text.
        digest.update(json.dumps([name, leaf.dtype, leaf.shape]).encode() + b"\n")
        (data,) = to_host({name: leaves[name]}, {}).values()
        digest.update(data.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
