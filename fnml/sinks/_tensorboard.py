"""Rows as TensorBoard scalars."""

import io
import time
from pathlib import Path
from typing import Any

from fnml.core import Row, RunError, fsync_directory, require
from fnml.sinks._lines import append, sync

_PREFIX = "events.out.tfevents."


def _open_next(directory: Path) -> Path:
    """Create an event file whose name sorts after all others, as readers go by name."""
    stamps = (
        path.name.removeprefix(_PREFIX).split(".")[0] for path in directory.glob(f"{_PREFIX}*")
    )
    later = [int(stamp) + 1 for stamp in stamps if stamp.isdecimal()]
    path = directory / f"{_PREFIX}{max([int(time.time()), *later]):010d}.fnml"
    path.touch(exist_ok=False)
    fsync_directory(directory)
    return path


class TensorBoard:
    """Write rows as scalars to a TensorBoard event file (extra ``tensorboard``, no TensorFlow).

    The tags are ``train/loss``, ``eval/accuracy`` and, for timing, ``time/steps_per_second``.
    Scalars are float32, as the format has it.

    Law: after a run was killed and continued with ``after=s``, TensorBoard shows each step once.
    Each start makes a new event file, which begins with a session mark at which readers forget
    the older files' steps from ``s + 1`` on; nothing is deleted.

    Args:
      directory: where the event files go; made if missing. One directory is one run.
      after: ``None`` for a new run, else the step to continue from; ``-1`` hides every older row.

    Raises:
      RunError: ``after`` is ``None`` and the directory has event files already.
      MissingExtraError: the package ``tensorboard`` is not installed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     sink = TensorBoard(directory)
    ...     sink.write(Row(10, "train", {"loss": 0.5}))
    ...     sink.close()
    """

    def __init__(self, directory: Path | str, after: int | None = None) -> None:
        self._proto: Any = require("tensorboard.compat.proto.event_pb2", extra="tensorboard")
        summary = require("tensorboard.compat.proto.summary_pb2", extra="tensorboard")
        self._summary: Any = summary.Summary
        # Not EventFileWriter: its file names order two starts within one second by process id,
        # and its thread reports a full disk too late to keep the row.
        records = require("tensorboard.summary.writer.record_writer", extra="tensorboard")
        self._record_writer: Any = records.RecordWriter
        directory = Path(directory).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        if after is None and any(directory.glob(f"{_PREFIX}*")):
            raise RunError(
                f"{directory} already holds event files, and a new run would mix with them: "
                "continue that run with after=<its last checkpoint's step>, hide its rows with "
                "after=-1, or choose another directory"
            )
        self._path = _open_next(directory)
        self._add(file_version="brain.Event:2")
        if after is not None:
            log = self._proto.SessionLog
            self._add(step=after + 1, session_log=log(status=log.START))

    def __repr__(self) -> str:
        return f"TensorBoard({str(self._path.parent)!r})"

    def _add(self, **fields: Any) -> None:
        record = io.BytesIO()
        event = self._proto.Event(wall_time=time.time(), **fields)
        self._record_writer(record).write(event.SerializeToString())
        append(self._path, record.getvalue())

    def write(self, row: Row) -> None:
        """Append one event with all of the row's scalars.

        Raises:
          OSError: the event could not be written; the file is as before.
        """
        scalars = {f"{row.kind}/{name}": value for name, value in row.values.items()}
        scalars |= {f"time/{name}": value for name, value in row.timing.items()}
        values = [
            self._summary.Value(tag=tag, simple_value=float(value))
            for tag, value in scalars.items()
        ]
        self._add(step=int(row.step), summary=self._summary(value=values))

    def flush(self) -> None:
        """Make the events written so far durable (fsync)."""
        sync(self._path)

    def close(self) -> None:
        """Make the events durable; nothing stays open."""
        self.flush()
