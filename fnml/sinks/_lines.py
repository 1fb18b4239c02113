"""A text file that holds whole rows only, whatever kills the process that writes it."""

import os
from collections.abc import Callable, Collection
from pathlib import Path

from fnml.core import ConfigError, Row, RunError, write_atomic


def begin(path: Path | str, after: int | None, cut: Callable[[bytes, Path, int], bytes]) -> Path:
    """Make ``path`` ready for a run's next row, and return it as an absolute path.

    Args:
      path: the file; missing directories are created.
      after: ``None`` for a new run, else the step that the run continues from.
      cut: ``cut(data, path, after)`` returns what to keep of an existing file.

    Raises:
      RunError: a new run was asked for, and the file already holds something.
      DataError: from ``cut``; the file is unchanged.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_bytes() if path.exists() else None
    if old and after is None:
        raise RunError(
            f"{path} already holds {len(old)} bytes, and a new run would mix with them: continue "
            "that run with after=<its last checkpoint's step>, drop all of its rows with "
            "after=-1, or choose another path"
        )
    new = cut(old, path, after) if old and after is not None else b""
    if new != old:
        write_atomic(path, new)
    return path


def append(path: Path, data: bytes) -> None:
    """Append all of ``data`` to an existing file, or, when that fails, nothing.

    Raises:
      OSError: the disk is full, or the file is gone or not writable.
    """
    # Not mode "a": a file that somebody removed would silently start again without its header.
    with path.open("r+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
        except BaseException:
            # Half a row in the middle of the file would make all of it unreadable later.
            file.truncate(end)
            raise


def sync(path: Path) -> None:
    """Make what was appended to ``path`` durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def refuse_names(row: Row, taken: Collection[str]) -> None:
    """Raise :class:`fnml.core.ConfigError` if a metric has the name of another column."""
    clashes = [name for name in row.values if name in taken]
    if clashes:
        raise ConfigError(
            f"the {row.kind} metrics {clashes} have the names of other columns "
            f"({', '.join(taken)}): rename them in the loss function"
        )
