"""Libraries of C++ bodies that are not compiled as users' are; matrix tiles on every processor."""

import functools
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from fnml.pallas_kernels import build_native, native_kernels
from fnml.pallas_kernels.native import _library

EMULATED = "-DFNML_EMULATED_TILES"
NATIVE = [option for option in _library.flags() if option.startswith(("-march", "-mcpu"))]


def build(place: Path, *options: str, sources: Sequence[str] = ("*",)) -> Path:
    """Compile the bodies as :func:`build_native` does, but for other options of the compiler."""
    kept = [x for x in _library.flags() if not x.startswith(("-march", "-mcpu", "-O"))]
    files = sorted(path for name in sources for path in _library.SOURCES.glob(f"{name}.cc"))
    library = place / f"libfnml-{'-'.join(options).strip('-')}.so"
    done = subprocess.run(
        [_library.compiler(), *kept, "-O1", "-shared", *options, *files, "-o", library],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return library


@functools.cache
def with_tiles() -> Path:
    """Return a library whose products run on tiles: the users', or one that emulates them.

    The emulation needs vectors of 16; without them this library has no tiles either.
    """
    library = build_native()
    if _library.library_has_tiles(library):
        return library
    with tempfile.TemporaryDirectory() as place:
        library = build(Path(place), *NATIVE, EMULATED, sources=("linear", "attention", "tiles"))
        _library.load(library)  # from now on it needs no file
    return library


@functools.cache
def tiles_anyhow() -> bool:
    """Tell whether :func:`with_tiles` has tiles, without compiling it."""
    if _library.library_has_tiles(build_native()):
        return True
    command = [_library.compiler(), *NATIVE, "-x", "c++", "-dM", "-E", "/dev/null"]
    macros = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return "__AVX512F__" in macros


def scope(tiles: bool) -> AbstractContextManager[None]:
    """Open the scope of C++ bodies: the users' without tiles, or :func:`with_tiles`."""
    return native_kernels(with_tiles() if tiles else None, tiles=tiles)
