"""Write a file whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def fsync_directory(directory: Path) -> None:
    """Make renames and creations inside ``directory`` durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a name beside ``path`` to write to; when the block ends well, the file takes its place.

    The file is made durable first. After a crash ``path`` is the old file or the new one, whole;
    when the block raises, the old one is kept.

    Raises:
      OSError: the directory is missing or not writable, or the disk is full.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "text")
    >>> with atomic_path(path) as temporary:
    ...     _ = temporary.write_text("whole")
    ...     path.exists()
    False
    >>> path.read_text()
    'whole'
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``: after a crash the file is the old one or the new one.

    Raises:
      OSError: the directory is missing or not writable, or the disk is full; the old file is kept.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and infinities are refused.

    Raises:
      ValueError: ``value`` holds a float that JSON has no word for.
      OSError: see :func:`write_atomic`.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomic(path, text.encode())
