"""A run directory: what it holds, and who may write to it."""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fnml.core import RunError, write_json

FORMAT = 1
_CONFIG, _RESULT = "config.json", "result.json"


def new_directory(parent: Path, name: str) -> Path:
    """Return a path below ``parent`` that does not exist yet: ``name`` and the time."""
    base = parent / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def create(directory: Path, record: Mapping[str, Any]) -> None:
    """Make the directory of a new run and write down what the run is.

    Raises:
      RunError: the directory exists and is not empty, or cannot be made.
    """
    if (directory / _CONFIG).exists():
        raise RunError(
            f"{directory} holds another run: continue it with 'fnml resume {directory}', or "
            "choose another directory with --out"
        )
    try:
        if directory.exists() and any(directory.iterdir()):
            raise RunError(
                f"{directory} is not empty and holds no run: choose another directory with --out"
            )
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / _CONFIG, {"format": FORMAT, **record})
    except OSError as error:
        raise RunError(f"{directory} cannot be used for a run: {error}") from error


def read_record(directory: Path) -> dict[str, Any]:
    """Read what the run in ``directory`` is.

    Raises:
      RunError: there is no run, its record cannot be read, or a newer fnml wrote it.
    """
    path = directory / _CONFIG
    if not directory.is_dir():
        raise RunError(f"there is no run directory {directory}: 'fnml runs' lists those that are")
    if not path.exists():
        raise RunError(f"{directory} holds no run: it has no {_CONFIG}")
    record = _read_object(path)
    if record.get("format") != FORMAT:
        raise RunError(
            f"{path} has format {record.get('format')!r}, this version reads {FORMAT}: use the "
            "fnml that wrote it"
        )
    for name, kind in (("recipe", str), ("config", dict), ("output", dict)):
        if not isinstance(record.get(name), kind):
            raise RunError(f"{path} is damaged: {name!r} is {record.get(name)!r}")
    return record


def read_result(directory: Path) -> dict[str, Any] | None:
    """Read the result of a finished run; ``None`` if it has not finished.

    Raises:
      RunError: the result cannot be read.
    """
    path = directory / _RESULT
    return _read_object(path) if path.exists() else None


def write_result(directory: Path, result: Mapping[str, Any]) -> None:
    """Write down that the run finished, and with what."""
    write_json(directory / _RESULT, result)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > 1 << 20:
            raise RunError(f"{path} is {path.stat().st_size} bytes, more than any record has")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} is damaged: expected a JSON object, got {type(value).__name__}")
    return value


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the run for this process; the lock goes with the process, however it ends.

    Raises:
      RunError: another process is training in this directory.
    """
    with (directory / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise RunError(
                f"{directory} is in use by process {file.read().strip() or 'unknown'}: wait for "
                "it, or stop it first"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
