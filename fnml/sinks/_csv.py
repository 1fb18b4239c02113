"""Rows as a table of comma-separated values."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from fnml.core import DataError, Row, write_atomic
from fnml.sinks._lines import append, begin, refuse_names, sync

_FIXED = ("step", "kind")
_TIME = "time/"


class _Table(NamedTuple):
    columns: tuple[str, ...]
    rows: list[dict[str, str]]


def _place(column: str) -> int:
    return 0 if column in _FIXED else 2 if column.startswith(_TIME) else 1


def _format(columns: Sequence[str], rows: Iterable[dict[str, str]]) -> bytes:
    text = io.StringIO()
    # With this line terminator the csv module would leave a carriage return unquoted.
    quote = any("\r" in column for column in columns)
    writer = csv.writer(
        text, lineterminator="\n", quoting=csv.QUOTE_ALL if quote else csv.QUOTE_MINIMAL
    )
    writer.writerows([row.get(column, "") for column in columns] for row in rows)
    return text.getvalue().encode()


def _render(table: _Table) -> bytes:
    header = {column: column for column in table.columns}
    return _format(table.columns, [header, *table.rows])


def _read(data: bytes, path: Path) -> _Table:
    """Parse a file that :class:`Csv` wrote; what follows the last newline was torn off."""

    def fault(line: int, what: str) -> DataError:
        return DataError(
            f"{path}, line {line}: {what}. Expected the table of a run, with the columns step, "
            "kind and numbers. The file was left as it is: move it away or repair that line"
        )

    whole = data[: data.rfind(b"\n") + 1]
    header = ",".join(_FIXED).encode()
    if not whole and header.startswith(data[: len(header)]):
        return _Table(_FIXED, [])
    try:
        text = (whole or data).decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise fault(line, f"byte {data[error.start]:#04x} is no UTF-8") from error
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = tuple(next(lines))
        if columns[:2] != _FIXED or len(set(columns)) < len(columns):
            raise fault(1, f"the header is {','.join(columns)[:80]!r}")
        rows = []
        for cells in lines:
            if len(cells) != len(columns):
                raise fault(lines.line_num, f"{len(cells)} cells under {len(columns)} columns")
            row = {name: cell for name, cell in zip(columns, cells, strict=True) if cell}
            try:
                int(cells[0])
                for column in columns[2:]:
                    float(row.get(column, "0"))
            except ValueError as error:
                raise fault(lines.line_num, str(error)) from error
            rows.append(row)
    except csv.Error as error:
        raise fault(lines.line_num, str(error)) from error
    return _Table(columns, rows)


def _cut(data: bytes, path: Path, after: int) -> bytes:
    columns, rows = _read(data, path)
    rows = [row for row in rows if int(row["step"]) <= after]
    return _render(_Table(columns, rows)) if rows else b""


class Csv:
    """Write rows to a CSV file with the columns step, kind, the metrics, and timing as ``time/...``.

    An empty cell means that the row has no such number; NaN is ``nan``. Finite floats read back as
    the same bits. A metric seen for the first time (evaluation starts late, say) replaces the
    file atomically by one with a wider header, so the table is rectangular at any instant; that
    costs one pass over the file for each new name, not for each row.

    Law: as for :class:`fnml.sinks.Jsonl`.

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
    ...     sink = Csv(f"{directory}/metrics.csv")
    ...     sink.write(Row(10, "train", {"loss": 0.5}, {"seconds": 1.5}))
    ...     sink.write(Row(10, "eval", {"loss": 0.25, "accuracy": 1.0}))
    ...     print(Path(f"{directory}/metrics.csv").read_text(), end="")
    step,kind,loss,accuracy,time/seconds
    10,train,0.5,,1.5
    10,eval,0.25,1.0,
    """

    def __init__(self, path: Path | str, after: int | None = None) -> None:
        self._path = begin(path, after, _cut)
        data = self._path.read_bytes()
        self._columns = _read(data, self._path).columns if data else _FIXED

    def __repr__(self) -> str:
        return f"Csv({str(self._path)!r})"

    def write(self, row: Row) -> None:
        """Append one line, after widening the table if the row has new columns.

        Raises:
          ConfigError: a metric is called ``step`` or ``kind``, or like a timing column.
          OSError: the line could not be written; the file is as before.
        """
        timing = {_TIME + name: repr(float(value)) for name, value in row.timing.items()}
        refuse_names(row, (*_FIXED, *timing))
        values = {name: repr(float(value)) for name, value in row.values.items()}
        cells = {"step": str(int(row.step)), "kind": row.kind, **values, **timing}
        new = [column for column in cells if column not in self._columns]
        if not new and self._path.stat().st_size:
            append(self._path, _format(self._columns, [cells]))
            return
        data = self._path.read_bytes()
        rows = _read(data, self._path).rows if data else []
        columns = tuple(sorted((*self._columns, *new), key=_place))
        write_atomic(self._path, _render(_Table(columns, [*rows, cells])))
        self._columns = columns

    def flush(self) -> None:
        """Make the rows written so far durable (fsync)."""
        sync(self._path)

    def close(self) -> None:
        """Make the rows durable; nothing stays open."""
        self.flush()
