"""Take C++ bodies on CPUs, in one function."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fnml.pallas_kernels import build_native, native_kernels


def native(
    function: Callable[..., Any], library: Path | None = None, *, tiles: bool = True
) -> Callable[..., Any]:
    """Return ``function`` with the C++ bodies of the kernels and layers that it calls, on CPUs.

    Give it the loss: its gradient's bodies are then C++ too, wherever that is taken. The
    bodies are compiled now, if they are not there yet; see
    :func:`fnml.pallas_kernels.native_kernels` for what is left as it is, and
    docs/speed.md for what it gains.

    Law: ``native(f) == f`` and ``grad(native(f)) == grad(f)`` to rounding, with the same bits for
    any number of threads. What ``vmap`` maps over it runs as without.

    Args:
      library: what :func:`fnml.pallas_kernels.build_native` returned; ``None`` to call it.
      tiles: whether products run on the processor's matrix tiles, if it has them.

    Raises:
      ConfigError: there is no C++ compiler, or it failed.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from fnml.pallas_kernels import attention, native_faults
    >>> q = jnp.ones((1, 64, 2, 16))
    >>> def loss(q):
    ...     return attention(q, q, q, causal=True).sum()
    >>> fast = loss if native_faults() else native(loss)
    >>> bool(jnp.allclose(jax.jit(jax.grad(fast))(q), jax.grad(loss)(q), atol=1e-6))
    True
    """
    built = library or build_native()

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with native_kernels(built, tiles=tiles):
            return function(*args, **kwargs)

    return wrapped
