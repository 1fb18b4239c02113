"""How this process keeps its memory, and how much it took at most."""

import ctypes
import functools
import importlib.util
import mmap
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import jax

from fnml.core._errors import ConfigError

# Names and values of glibc's mallopt, from its <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

_COMPILED = "/jax/core/compile/backend_compile_duration"

_GROWN = 16 << 20
"""Bytes by which a process grows before freed blocks are given back."""
_SHORTEST, _SHARE = 0.005, 0.02
"""Seconds between two looks, and the same as a share of the time since the last compilation."""


def keep_memory(arenas: int = 1) -> bool:
    """Keep large freed blocks for the next step, for this process, from now on.

    On a CPU every step frees and takes again its activations, and glibc returns large blocks to the
    kernel, which clears each page anew: for a small GPT that costs a fifth of the step. Kept, the
    memory stays at the run's peak. Models whose step lasts less than about a millisecond gain
    nothing and may lose, since all threads then share ``arenas`` pools: leave it off for those, or
    give each of a few threads its own. Call it before the first computation; no result changes.

    So that what is kept is one step's memory and no more, a call of a compiled function then returns
    when it has run (``jax_cpu_enable_async_dispatch`` is off), since a step that starts before the
    last one has freed its blocks takes new ones; and what a compilation leaves is given back. A
    thread gives back the block that a step has left for another place, as most do once within the
    first three steps, while the process grows for it. glibc's caches of small pieces keep some
    blocks moving: start a program with ``GLIBC_TUNABLES=glibc.malloc.tcache_count=0`` in its
    environment, and they stay where they are.

    Args:
      arenas: how many pools there are at most. One gains most.

    Returns:
      Whether it took effect: ``False`` where the C library is not glibc, and where JAX has another
      platform than the CPU to compute on.

    Raises:
      ConfigError: ``arenas`` is below 1.

    >>> keep_memory(arenas=2) in (True, False)
    True
    """
    if arenas < 1:
        raise ConfigError(f"arenas={arenas}: expected at least 1")
    mallopt = _mallopt()
    if mallopt is None or not _only_cpu():
        return False
    wanted = (
        (_M_ARENA_MAX, arenas),
        (_M_MMAP_THRESHOLD, 1 << 30),
        (_M_TRIM_THRESHOLD, (1 << 31) - 1),
    )
    if [mallopt(option, value) for option, value in wanted] != [1, 1, 1]:
        return False
    _one_step_at_a_time()
    return True


def can_keep_memory() -> str | None:
    """Say why :func:`keep_memory` would have no effect here; ``None`` if it would have one."""
    if _mallopt() is None:
        return "the C library is not glibc"
    return None if _only_cpu() else "JAX may compute on another platform than the CPU"


def peak_memory() -> int:
    """Return the most bytes of memory that this process has held so far.

    >>> peak_memory() > 1 << 20
    True
    """
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@functools.cache
def _one_step_at_a_time() -> None:
    """Let no step start before the last one has ended, and none on top of a compiler's leavings."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    trim = ctypes.CDLL(None).malloc_trim
    compiled = threading.Event()

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        # After small programs too, such as the one that reads a loss: what they keep may lie where
        # the last step's working memory was, which then no step fits into again.
        if event == _COMPILED:
            trim(0)
            compiled.set()

    jax.monitoring.register_event_duration_secs_listener(listen)
    threading.Thread(
        target=_give_back_strays, args=(trim, compiled), name="fnml.keep_memory", daemon=True
    ).start()


def _give_back_strays(trim: Callable[[int], int], compiled: threading.Event) -> None:
    """Give back the blocks that steps have left, whenever the process grows, for as long as it lives.

    For an aligned block glibc takes up to a hundred bytes more and frees what is left of them. Where
    those have another owner when the block is freed, it is too small for the next step by just as
    much, and that step takes a new one. What is free while it runs is then of no use to it.

    The looks grow rare with the time since the last compilation: a program whose blocks never come
    to rest would otherwise have the pages of each cleared in every step.
    """
    began, least = time.monotonic(), _resident()
    while True:
        if compiled.wait(max(_SHORTEST, _SHARE * (time.monotonic() - began))):
            compiled.clear()
            began = time.monotonic()
        held = _resident()
        if held > least + _GROWN:
            trim(0)
            held = least = _resident()
        least = min(least, held)


def _resident() -> int:
    """Return how many bytes of memory this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def _mallopt() -> "ctypes._NamedFuncPointer | None":
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(None)
        # musl has a mallopt too, of no effect.
        return library.mallopt if hasattr(library, "gnu_get_libc_version") else None
    except (OSError, AttributeError):
        return None


def _only_cpu() -> bool:
    """Tell whether JAX can only compute on CPUs, without starting it: then it would be too late."""
    named = jax.config.jax_platforms  # type: ignore[attr-defined]
    if named:
        return named == "cpu"
    plugins = {"jax_plugins", "libtpu"}
    return not any(entry_points(group="jax_plugins")) and not any(
        importlib.util.find_spec(name) for name in plugins
    )
