"""Compiled programs on disk, for the next process: where, for which machine, and how many."""

import contextlib
import hashlib
import os
import platform
import sys
import time
import zlib
from pathlib import Path

import jax

_VARIABLE = "FNML_CACHE_DIR"
_CHECKED = ".checked"


def compilation_cache(
    directory: Path | None = None, *, most_bytes: int = 1 << 30
) -> tuple[Path | None, str]:
    """Keep compiled programs on disk, so that a later process need not compile them again.

    The command line calls it; a library user may. Whoever has chosen a cache already
    (``JAX_COMPILATION_CACHE_DIR``) keeps it as it is. Programs are kept apart by what they were
    compiled for: jaxlib, the processor's instructions and the number of CPUs, on which bits depend.
    Call it before the first computation.

    Law: a program from the cache is the one that was compiled; no result changes.

    Args:
      directory: where to; by default ``FNML_CACHE_DIR``, or ``fnml`` in the user's cache folder.
        Whoever can write to it can run code as you. ``FNML_CACHE_DIR=off`` switches it off.
      most_bytes: the programs used longest ago are removed until the rest is no more.

    Returns:
      Where programs are kept, or ``None``, and why: in words, for ``fnml doctor``.

    >>> from unittest import mock
    >>> with mock.patch.dict(os.environ, FNML_CACHE_DIR="off"):
    ...     where, why = compilation_cache()
    >>> "FNML_CACHE_DIR" in why or "JAX_COMPILATION_CACHE_DIR" in why
    True
    """
    chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    root = directory or cache_folder()
    if root is None:
        if chosen:
            return Path(chosen), "chosen through JAX (JAX_COMPILATION_CACHE_DIR)"
        return None, f"off, by {_VARIABLE}; without the variable it is on"
    place = root.absolute() / "xla" / machine()
    if chosen and chosen != str(place):
        return Path(chosen), "chosen through JAX (JAX_COMPILATION_CACHE_DIR)"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_damaged(place)
        _remove_oldest(root / "xla", most_bytes)
    except OSError as error:
        return None, f"off: {root} cannot be used ({error})"
    jax.config.update("jax_compilation_cache_dir", str(place))
    # By default only what took a second to compile is kept, but small programs add up.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return place, f"{_VARIABLE}=off switches it off"


def machine() -> str:
    """Name what compiled programs are for: jaxlib, the processor's instructions, how many CPUs.

    >>> machine() == machine()
    True
    """
    import jaxlib

    text = platform.processor()
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
            # The first of each: all processors of a machine are of one kind.
            wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
            text = str(
                [next((x for x in lines.splitlines() if x.startswith(w)), "") for w in wanted]
            )
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"jaxlib-{jaxlib.__version__}-{platform.machine()}-{kind}-{cpus}cpu"


def cache_folder() -> Path | None:
    """Return where this user keeps what fnml has compiled, or ``None`` if nowhere.

    ``FNML_CACHE_DIR`` names the folder, or is ``off``; else it is ``fnml`` in the user's cache
    folder. It need not be there yet.
    """
    variable = os.environ.get(_VARIABLE)
    if variable:
        return None if variable == "off" else Path(variable)
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path("~/.cache").expanduser()) / "fnml"


def _remove_damaged(place: Path) -> None:
    """Remove what a process that was killed left half written: JAX would never write it again."""
    stamp = place / _CHECKED
    since = stamp.stat().st_mtime_ns if stamp.exists() else 0
    # What is written from now on is looked at next time; a file's time is a little coarse.
    now = time.time_ns() - 1_000_000_000
    for path in place.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime_ns >= since and _is_damaged(path.read_bytes()):
                path.unlink()
    stamp.touch()
    os.utime(stamp, ns=(now, now))


def _is_damaged(data: bytes) -> bool:
    """Tell whether a zlib stream is cut short or altered; other formats are JAX's to judge."""
    if data and data[0] != 0x78:
        return False
    try:
        return not zlib.decompress(data)
    except zlib.error:
        return True


def _remove_oldest(root: Path, most: int) -> None:
    found = []
    for path in root.glob("*/*-cache"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found.append((max(status.st_atime_ns, status.st_mtime_ns), status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= most:
            return
        path.unlink(missing_ok=True)
        total -= size
