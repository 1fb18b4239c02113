"""Write one step, whole or not at all."""

import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from fnml.checkpoint import _manifest
from fnml.checkpoint._arrays import write_arrays
from fnml.checkpoint._manifest import File, Manifest
from fnml.checkpoint._steps import ARRAYS, META, aside, delete, step_name, temporary
from fnml.checkpoint._tree import Leaf
from fnml.checkpoint._verify import file_sha256
from fnml.core import fsync_directory

# hashlib and fsync release the GIL; the training on the same cores needs some of them, too.
_SEALERS = 2


def write_step(
    directory: Path,
    step: int,
    arrays: Mapping[str, np.ndarray],
    tree: Mapping[str, Leaf],
    meta: bytes,
    metric: float | None,
) -> None:
    """Write a step durably; killed at any instant, it is there as a whole or not at all.

    A step of this number that is there already is replaced: it is set aside, under a name that
    still counts, until the new one is in its place.
    """
    work = temporary(directory, step)
    if work.exists():
        shutil.rmtree(work)
    work.mkdir()
    write_arrays(work / ARRAYS, arrays)
    (work / META).write_bytes(meta)

    created = datetime.now(UTC).isoformat(timespec="seconds")
    entries = _seal_all(work)
    for folder in (path for path in work.rglob("*") if path.is_dir()):
        fsync_directory(folder)
    manifest = work / _manifest.NAME
    manifest.write_bytes(_manifest.render(Manifest(step, metric, created, entries, tree)))
    _fsync(manifest)
    fsync_directory(work)

    final, old = directory / step_name(step), aside(directory, step)
    replaces = final.exists()
    if replaces:
        final.rename(old)
    work.rename(final)
    fsync_directory(directory)
    if replaces:
        delete(directory, step, old)


def _seal_all(work: Path) -> dict[str, File]:
    """Seal every file below ``work``, by its path relative to that."""
    files = [path for path in work.rglob("*") if path.is_file()]
    # The largest first, so that the threads end at about the same time.
    files.sort(key=lambda path: path.stat().st_size, reverse=True)
    with ThreadPoolExecutor(_SEALERS, "fnml-seal") as pool:
        names = (path.relative_to(work).as_posix() for path in files)
        return dict(zip(names, pool.map(_seal, files), strict=True))


def _seal(path: Path) -> File:
    """Make a file durable and hash what is in it."""
    _fsync(path)
    return File(path.stat().st_size, file_sha256(path))


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
