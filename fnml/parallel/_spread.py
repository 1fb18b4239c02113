"""Put values that every process has onto devices of all of them, and back."""

from typing import Any

import jax
import numpy as np

PyTree = Any


def spread(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Put an array, the same in every process, onto devices of all of them; nothing is sent.

    ``jax.device_put`` compares the array between the processes first, and refuses typed keys.

    Args:
      x: an array that this process holds whole, typed keys included.
      sharding: where it shall lie.

    >>> here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    >>> spread(np.arange(3), here)
    Array([0, 1, 2], dtype=int32)
    """
    if isinstance(x, jax.Array) and x.sharding == sharding:
        return x
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        words = spread(jax.random.key_data(x), sharding)
        return jax.jit(jax.random.wrap_key_data, static_argnames="impl")(
            words, impl=str(jax.random.key_impl(x))
        )
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def gathered(tree: PyTree) -> PyTree:
    """Return a tree's arrays as arrays that this process holds whole.

    What is sharded over processes is sent to all of them, so all have to call it together.
    """

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        if not x.is_fully_replicated:
            assert isinstance(x.sharding, jax.NamedSharding)
            everywhere = jax.NamedSharding(x.sharding.mesh, jax.P())
            x = jax.jit(lambda x: x, out_shardings=everywhere)(x)
        return x.addressable_data(0)

    return jax.tree.map(whole, tree)
