"""The library of C++ bodies: compiled once on each machine, and loaded."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from fnml.core import ConfigError, atomic_path, cache_folder, machine

SOURCES = Path(__file__).parent / "cc"
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fPIC",
    "-Wall",
    "-Wextra",
)
_COMPILERS = ("c++", "g++", "clang++")
_KEPT = 8


def compiler() -> str | None:
    """Return the C++ compiler to use: the program ``CXX``, or the first there is; ``None`` if there is none."""
    given = os.environ.get("CXX")
    names = [given] if given else _COMPILERS
    return next((path for name in names if (path := shutil.which(name))), None)


def native_faults() -> list[str]:
    """Say why C++ bodies cannot be compiled here; nothing if they can.

    >>> isinstance(native_faults(), list)
    True
    """
    if compiler() is not None:
        return []
    if given := os.environ.get("CXX"):
        return [f"CXX={given}: no such program"]
    return [f"no C++ compiler ({', '.join(_COMPILERS)}); on Debian: apt-get install g++"]


def build_native(directory: Path | None = None) -> Path:
    """Compile the C++ bodies for this machine, unless they are there, and return the library.

    It takes some ten seconds and GCC 12 or newer, once: the library is named for its sources, the compiler, its flags,
    jaxlib and the processor, and kept in ``directory``, by default in the folder of
    :func:`fnml.compilation_cache`. Whoever can write to that folder can run code as you.

    Raises:
      ConfigError: there is no compiler, it failed (its message is told), others can write to the
        folder, or nothing may be kept (``FNML_CACHE_DIR=off``) and no directory is given.
      OSError: the directory cannot be written to.
    """
    faults = native_faults()
    found = compiler()
    if found is None:
        raise ConfigError(f"the C++ kernels cannot be built: {'; '.join(faults)}")
    root = directory or cache_folder()
    if root is None:
        raise ConfigError(
            "the C++ kernels cannot be kept: FNML_CACHE_DIR is off. Give build_native a directory"
        )
    command = [found, *flags()]
    sources = sorted(SOURCES.glob("*.cc"))
    place = root.absolute() / "native" / machine()
    library = place / f"libfnml-{_key(command)}.so"
    for folder in (place.parent, place):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_foreign(folder)
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=place) as objects, atomic_path(library) as temporary:

        def translate(source: Path) -> str:
            out = str(Path(objects, f"{source.stem}.o"))
            _run([*command, "-c", str(source), "-o", out])
            return out

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = list(pool.map(translate, sources))
        _run([*command, "-shared", *parts, "-o", str(temporary)])
    _remove_oldest(place)
    return library


@functools.cache
def _version(program: str) -> bytes:
    return subprocess.run([program, "--version"], capture_output=True, check=False).stdout


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(
            f"{command[0]} could not compile the C++ kernels (GCC 12 or newer is needed):\n"
            f"{done.stderr[-4000:].strip()}"
        )


def _refuse_foreign(folder: Path) -> None:
    found = folder.stat()
    if found.st_uid not in (0, os.getuid()) or found.st_mode & 0o022:
        raise ConfigError(
            f"{folder} belongs to or can be written by others, who could run code as you: "
            "chmod go-w it, or name another folder in FNML_CACHE_DIR"
        )


def _remove_oldest(place: Path) -> None:
    """Keep the libraries of a few versions; whoever has loaded one does not lose it."""
    with contextlib.suppress(FileNotFoundError):
        found = sorted(place.glob("libfnml-*.so"), key=lambda path: path.stat().st_mtime_ns)
        for path in found[:-_KEPT]:
            path.unlink(missing_ok=True)


def flags() -> list[str]:
    """Return what the compiler is told beside the names of files."""
    arm = platform.machine() in ("aarch64", "arm64")
    include = jax.ffi.include_dir()
    # The headers of XLA are a system's: their warnings are not ours.
    return [*_FLAGS, "-mcpu=native" if arm else "-march=native", "-isystem", include]


def _key(command: list[str]) -> str:
    """Tell libraries apart: by the sources, the compiler and what it is told."""
    digest = hashlib.sha256(_version(command[0]) + "\0".join(command).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def load(library: Path) -> ctypes.CDLL:
    """Load a library into this process, where it stays."""
    return ctypes.CDLL(str(library))


@functools.cache
def library_has_tiles(library: Path) -> bool:
    """Tell whether a library's products can run on matrix tiles in this process."""
    answer = load(library).fnml_has_tiles
    answer.restype = ctypes.c_bool
    return bool(answer())


@functools.cache
def register(library: Path, target: str) -> str:
    """Make one of the library's functions known to XLA, and return the name it has there.

    The name carries the library's own: a program that XLA's cache kept from other sources
    does not find these.
    """
    name = f"{target}-{library.stem.removeprefix('libfnml-')}"
    handler = jax.ffi.pycapsule(getattr(load(library), target))
    jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return name
