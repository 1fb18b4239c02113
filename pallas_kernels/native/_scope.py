"""Where C++ bodies are taken: inside a scope that the user opens."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from fnml.pallas_kernels.native._library import (
    build_native,
    library_has_tiles,
    load,
    native_faults,
)


class Bodies(NamedTuple):
    """The C++ bodies of a scope: their library, and whether products may run on matrix tiles."""

    library: Path
    tiles: bool = True


# JAX's own kind of context: what is traced inside and outside is cached apart.
_bodies = jax.make_user_context(None)

_entered: list[Bodies] = []
"""Those of the scope that was entered last, for what is traced after it has ended."""


@contextlib.contextmanager
def native_kernels(library: Path | None = None, *, tiles: bool = True) -> Iterator[None]:
    """Let kernels and layers run their C++ bodies on CPUs, in what is traced inside.

    For float32 on a CPU these are faster than what XLA makes of the other bodies (docs/speed.md
    has figures). They are compiled on first use, which takes some ten seconds and a C++ compiler
    (:func:`build_native`); later processes find the library. A program keeps what it was traced
    with, so enter the scope wherever a jitted function is called, or wrap what is differentiated
    once with :func:`fnml.transforms.native`.

    What stays as it is: other platforms, programs that the compiler divides over a mesh that is set, other
    dtypes, whatever is vmapped. Second derivatives are those of the other bodies; through a
    ``lax.scan`` JAX forgets them and raises: take those outside. A program with C++ bodies cannot
    be exported to another process (``jax.export``).

    Where the processor has matrix tiles for bfloat16 (Intel AMX), the linear layer's and attention's
    float32 products run on them: each number as the sum of three of bfloat16, and of the nine
    products of two such sums the six largest, added up in float32. What is left out is below a
    rounding (2^-24). Operands with a number that is not finite are multiplied without tiles, and
    below 1e-33 numbers lose digits. Henry, Tang and Heinecke 2019, arXiv:1904.06376.

    Law: results equal those outside to rounding, and are the same bits for any number of threads.

    Args:
      library: what :func:`build_native` returned; ``None`` to call it.
      tiles: whether matrix tiles are used where there are any. They add in another order: without
        them the bits are those of processors that have none.

    Raises:
      ConfigError: see :func:`build_native`.

    >>> import jax.numpy as jnp
    >>> from fnml.pallas_kernels import attention
    >>> from fnml.pallas_kernels.native import native_faults, native_kernels
    >>> q = jnp.ones((1, 64, 2, 16))
    >>> if not native_faults():
    ...     with native_kernels():
    ...         assert jnp.allclose(attention(q, q, q), 1.0)
    """
    # A name without a folder would be looked for among the system's libraries.
    library = (library or build_native()).absolute()
    load(library)
    bodies = Bodies(library, tiles)
    _entered[:] = [bodies]
    with _bodies(bodies):
        yield


def active() -> bool:
    """Tell whether this is traced inside :func:`native_kernels`."""
    return _bodies.value is not None


def unavailable() -> list[str]:
    """Say why there are no C++ bodies here; nothing in a scope, which has its library."""
    return [] if active() else native_faults()


def in_use() -> Bodies:
    """Return the bodies of the scope that this is traced in, or of the last one there was.

    A backward rule may be traced when the scope of its forward rule has ended.
    """
    if _bodies.value is not None:
        return Bodies(*_bodies.value)
    return _entered[0] if _entered else Bodies(build_native())


def has_tiles() -> bool:
    """Tell whether products run on matrix tiles here: the processor has them, and the scope allows them."""
    bodies = in_use()
    return bodies.tiles and library_has_tiles(bodies.library)
