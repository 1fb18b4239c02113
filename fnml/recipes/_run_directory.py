"""A run directory: what it holds, and who may write to it."""

import contextlib
import fcntl
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fnml.core import RunError, write_atomic, write_json

FORMAT = 1
_CONFIG, _RESULT = "config.json", "result.json"
_METRICS = ("train", "eval")
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")  # what write_atomic names a file that is not whole yet


def new_directory(parent: Path, name: str) -> Path:
    """Make a directory below ``parent`` that nobody else has: ``name`` and the time.

    Raises:
      RunError: it cannot be made.
    """
    base, number = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}", 1
    path = parent / base
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            # Runs are often started together: only making it tells whose it is.
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path
            number += 1
            path = parent / f"{base}-{number}"
    except OSError as error:
        raise RunError(f"{path} cannot be used for a run: {error}") from error


def create(directory: Path, record: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Make the directory of a new run, with its files and a record of what the run is.

    Raises:
      RunError: the directory exists and is not empty, cannot be made, or has a name that
        checkpoints cannot.
    """
    try:
        str(directory.absolute()).encode()
    except UnicodeEncodeError as error:
        raise RunError(
            f"{directory} is no UTF-8 name, which checkpoints need: choose another with --out"
        ) from error
    try:
        if (directory / _CONFIG).exists():
            raise RunError(
                f"{directory} holds another run: continue it with 'fnml resume {directory}', or "
                "choose another directory with --out"
            )
        if directory.exists() and any(directory.iterdir()):
            raise RunError(
                f"{directory} is not empty and holds no run: choose another directory with --out"
            )
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_atomic(directory / name, data)
        # Last, so that a directory that has it has all of the run.
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
    if not path.is_file():
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
    if not path.exists():
        return None
    result = _read_object(path)
    kinds = (("recipe", str), ("step", int), ("seconds", float), ("params_sha256", str))
    faults = [
        f"{name!r} is {result.get(name)!r}"
        for name, kind in kinds
        if not isinstance(result.get(name), kind)
    ]
    for name in _METRICS:
        try:
            result[name] = {key: float(value) for key, value in result[name].items()}
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            faults.append(f"{name!r} is {result.get(name)!r}")
    if faults:
        raise RunError(f"{path} is damaged: " + "; ".join(faults))
    return result


def write_result(directory: Path, result: Mapping[str, Any]) -> None:
    """Write down that the run finished, and with what; metrics may be NaN or infinite."""
    metrics = {
        name: {key: x if math.isfinite(x) else str(x) for key, x in result[name].items()}
        for name in _METRICS
    }
    write_json(directory / _RESULT, {**result, **metrics})


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


def sweep(directory: Path) -> None:
    """Remove the temporary files of processes that were killed; call it holding the run."""
    for path in directory.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
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
