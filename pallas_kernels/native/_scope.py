"""Where C++ bodies are taken: inside a scope that the user opens."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from fnml.pallas_kernels.native._library import build_native, load, native_faults

# JAX's own kind of context: what is traced inside and outside is cached apart.
_library = jax.make_user_context(None)

_entered: list[Path] = []
"""The library of the scope that was entered last, for what is traced after it has ended."""


@contextlib.contextmanager
def native_kernels(library: Path | None = None) -> Iterator[None]:
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

    Law: results equal those outside to rounding, and are the same bits for any number of threads.

    Args:
      library: what :func:`build_native` returned; ``None`` to call it.

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
    _entered[:] = [library]
    with _library(library):
        yield


def active() -> bool:
    """Tell whether this is traced inside :func:`native_kernels`."""
    return _library.value is not None


def unavailable() -> list[str]:
    """Say why there are no C++ bodies here; nothing in a scope, which has its library."""
    return [] if active() else native_faults()


def library_in_use() -> Path:
    """Return the library of the scope that this is traced in, or of the last one there was.

    A backward rule may be traced when the scope of its forward rule has ended.
    """
    if _library.value is not None:
        return Path(_library.value)
    return _entered[0] if _entered else build_native()
