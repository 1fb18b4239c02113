"""Write a file whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def fsync_directory(directory: Path) -> None:
    """Make renames and creations inside ``directory`` durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``: after a crash the file is the old one or the new one.

    Raises:
      OSError: the directory is missing or not writable, or the disk is full; the old file is kept.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and infinities are refused.

    Raises:
      ValueError: ``value`` holds a float that JSON has no word for.
      OSError: see :func:`write_atomic`.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomic(path, text.encode())
