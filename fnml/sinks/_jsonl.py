"""Rows as JSON, one object a line."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fnml.core import DataError, Row
from fnml.sinks._lines import append, begin, refuse_names, sync

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_START = b'{"step": '


def _encode(value: float) -> float | str:
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _decode(name: str, value: Any) -> float:
    if isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name!r} is {value!r}, not a number")
    return float(value)


def _parse(line: bytes) -> Row:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise TypeError(f"a JSON {type(record).__name__}, not an object")
    step, kind, timing = (
        record.pop("step", None),
        record.pop("kind", None),
        record.pop("timing", {}),
    )
    if type(step) is not int:
        raise TypeError(f"'step' is {step!r}, not an integer")
    if kind not in ("train", "eval"):
        raise ValueError(f"'kind' is {kind!r}, not 'train' or 'eval'")
    if not isinstance(timing, dict):
        raise TypeError(f"'timing' is {timing!r}, not an object")
    return Row(
        step,
        kind,
        {name: _decode(name, value) for name, value in record.items()},
        {name: _decode(name, value) for name, value in timing.items()},
    )


def _lines(data: bytes, path: Path) -> Iterator[tuple[bytes, Row]]:
    """Yield each whole line of ``data`` with its row; a torn last line is left out."""
    *whole, tail = data.split(b"\n")
    found = 0
    for number, line in enumerate((*whole, tail), start=1):
        if not line.strip():
            continue
        try:
            row = _parse(line)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            # Only a file that is ours has a torn end; anything else is somebody's data.
            if number > len(whole) and (found or line[: len(_START)] == _START[: len(line)]):
                return
            raise DataError(
                f"{path}, line {number}: {error}. Expected the rows of a run, each a JSON object "
                "with an integer 'step', a 'kind' and numbers. The file was left as it is: move "
                "it away or repair that line"
            ) from error
        found += 1
        yield line + b"\n", row


def _cut(data: bytes, path: Path, after: int) -> bytes:
    return b"".join(line for line, row in _lines(data, path) if row.step <= after)


class Jsonl:
    """Write rows to a file of JSON lines.

    A line is ``{"step": 10, "kind": "train", "loss": 0.5, "timing": {"seconds": 1.5}}``. Finite
    floats are written so that they read back as the same bits; the others, for which JSON has no
    word, as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``.

    Law: a run that is killed at any instant and continued from a checkpoint of step ``s`` with
    ``after=s`` leaves the same rows, timing aside, as one that was not killed, provided that it
    calls :meth:`flush` before it saves the checkpoint.

    Args:
      path: the file; missing directories are created.
      after: ``None`` for a new run. A step to continue from: rows with a later step, and a last
        line that a crash left unfinished, are dropped in one atomic replacement of the file.
        ``-1`` drops every row.

    Raises:
      RunError: ``after`` is ``None`` and the file already holds something.
      DataError: a line is not a row of a run; the message has its number, the file is unchanged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     sink = Jsonl(f"{directory}/metrics.jsonl")
    ...     sink.write(Row(10, "train", {"loss": 0.5}))
    ...     sink.close()
    ...     read_jsonl(f"{directory}/metrics.jsonl")
    [Row(step=10, kind='train', values={'loss': 0.5}, timing={})]
    """

    def __init__(self, path: Path | str, after: int | None = None) -> None:
        self._path = begin(path, after, _cut)

    def __repr__(self) -> str:
        return f"Jsonl({str(self._path)!r})"

    def write(self, row: Row) -> None:
        """Append one line.

        Raises:
          ConfigError: a metric is called ``step``, ``kind`` or ``timing``.
          OSError: the line could not be written; the file is as before.
        """
        refuse_names(row, ("step", "kind", "timing"))

        def encoded(numbers: Mapping[str, float]) -> dict[str, Any]:
            return {name: _encode(value) for name, value in numbers.items()}

        record = {"step": int(row.step), "kind": row.kind, **encoded(row.values)}
        if row.timing:
            record["timing"] = encoded(row.timing)
        append(self._path, json.dumps(record, allow_nan=False).encode() + b"\n")

    def flush(self) -> None:
        """Make the rows written so far durable (fsync)."""
        sync(self._path)

    def close(self) -> None:
        """Make the rows durable; nothing stays open."""
        self.flush()


def read_jsonl(path: Path | str) -> list[Row]:
    """Read the rows that :class:`Jsonl` wrote, also of a run that is still writing.

    Raises:
      DataError: a line is not a row of a run, or the file does not exist.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}: give the metrics file of a run") from error
    return [row for _, row in _lines(data, path)]
