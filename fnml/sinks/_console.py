"""Rows for the person who watches: a progress bar on a terminal, plain lines elsewhere."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TextIO

from fnml.core import ConfigError, Row

_REFRESH_SECONDS = 0.1


def _number(value: float) -> str:
    """Format a number for reading: five significant digits, large ones without an exponent."""
    value = float(value)
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.5g}"


def _plain(text: str, stream: TextIO) -> str:
    """Spell out what the stream's encoding has no byte for: a log line must not end the run."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class Console:
    """Show rows on a terminal, or as plain lines when the output is a file or a pipe.

    On a terminal: a bar with the step, the newest training metrics, steps and samples per second,
    the time left, the share of time spent waiting for data, and the time spent compiling;
    evaluations and notes stay above it as lines. Narrow terminals cut the lines.

    Elsewhere: one line a row, with no escape codes, of ``key=value`` pairs in a fixed order::

        step=300/1000 kind=train loss=0.69315 steps_per_second=12.5 data_wait=0.02 eta_seconds=56

    Numbers have five significant digits; the exact ones are in :class:`fnml.sinks.Jsonl`.

    Args:
      total_steps: the step at which the run ends.
      start: the step that the run continues from, where the bar begins.
      stream: where to write; standard output by default.
      metrics: names of metrics to show first, in this order; others follow as the row has them.

    Raises:
      ConfigError: ``total_steps`` is less than 1.

    >>> sink = Console(1000, stream=sys.stdout)
    >>> sink.write(Row(300, "train", {"loss": 0.69315}, {"steps_per_second": 12.5}))
    step=300/1000 kind=train loss=0.69315 steps_per_second=12.5 eta_seconds=56
    >>> sink.note("checkpoint 300 saved")
    checkpoint 300 saved
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start: int = 0,
        stream: TextIO | None = None,
        metrics: Sequence[str] = ("loss", "accuracy"),
    ) -> None:
        if total_steps < 1:
            raise ConfigError(f"total_steps is {total_steps}: expected at least 1")
        self._total = total_steps
        self._stream = sys.stdout if stream is None else stream
        self._metrics = tuple(metrics)
        self._row = Row(start, "train", {})
        self._timing: dict[str, float] = {}
        self._shown = -math.inf
        self._live = self._open()
        self.flush()

    def __repr__(self) -> str:
        return f"Console({getattr(self._stream, 'name', self._stream)!r})"

    def _open(self) -> Any:
        """Return a started live display, or ``None`` where there is no terminal for one."""
        if not self._stream.isatty():
            return None
        from rich.console import Console as RichConsole
        from rich.live import Live

        console = RichConsole(file=self._stream, highlight=False, markup=False, emoji=False)
        if not console.is_terminal or console.is_dumb_terminal:
            return None
        ours = self._stream in (sys.stdout, sys.stderr)
        live = Live(
            console=console,
            auto_refresh=False,
            get_renderable=self._render,
            vertical_overflow="crop",
            # While the bar is up, print() and logging appear above it, not through it.
            redirect_stdout=ours and sys.stdout.isatty(),
            redirect_stderr=ours and sys.stderr.isatty(),
        )
        live.start()
        # A killed run should not leave a terminal without a cursor.
        console.show_cursor(True)
        return live

    def _ordered(self, row: Row) -> list[tuple[str, str]]:
        first = [name for name in self._metrics if name in row.values]
        names = first + [name for name in row.values if name not in first]
        return [("_".join(name.split()), _number(row.values[name])) for name in names]

    def _eta(self, row: Row) -> float | None:
        """Return the seconds left, if the speed is known."""
        speed = row.timing.get("steps_per_second", self._timing.get("steps_per_second", 0.0))
        left = max(self._total - row.step, 0) / speed if speed > 0 else math.inf
        return left if left < timedelta.max.total_seconds() else None

    def _speed(self) -> list[str]:
        timing = self._timing
        parts = [
            f"{_number(timing[name])} {text}"
            for name, text in (("steps_per_second", "steps/s"), ("samples_per_second", "samples/s"))
            if name in timing
        ]
        if "data_wait" in timing:
            parts.append(f"data wait {timing['data_wait']:.1%}")
        if "compile_seconds" in timing:
            parts.append(f"compile {timing['compile_seconds']:.1f}s")
        return parts

    def _render(self) -> Any:
        """Return the two lines of the display: the bar, and the newest numbers."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        row, eta = self._row, self._eta(self._row)
        place = f"{row.step}/{self._total}"
        if eta is not None:
            place += f"  eta {timedelta(seconds=round(eta))}"
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        grid.add_row(ProgressBar(self._total, min(row.step, self._total)), self._line(place))
        numbers = [f"{name} {value}" for name, value in self._ordered(row)] + self._speed()
        return Group(grid, self._line("  ".join(numbers))) if numbers else grid

    def _line(self, text: str) -> Any:
        from rich.text import Text

        return Text(_plain(text, self._stream), no_wrap=True, overflow="crop")

    def _fit(self) -> None:
        """Follow the size of our own terminal; rich looks at the standard streams only."""
        with contextlib.suppress(OSError):
            width, height = os.get_terminal_size(self._stream.fileno())
            if width and height:
                self._live.console.size = (width, height)

    def _say(self, text: str) -> None:
        """Write a line that stays."""
        if self._live is None:
            self._stream.write(_plain(text, self._stream) + "\n")
            self._stream.flush()
        else:
            from rich.text import Text

            self._refresh()
            self._live.console.print(Text(_plain(text, self._stream)), soft_wrap=True)

    def write(self, row: Row) -> None:
        """Show one row."""
        self._timing.update(row.timing)
        if row.kind == "train":
            self._row = row
        if self._live is None:
            pairs = [("step", f"{row.step}/{self._total}"), ("kind", row.kind), *self._ordered(row)]
            pairs += [(name, _number(value)) for name, value in row.timing.items()]
            eta = self._eta(row) if "steps_per_second" in row.timing else None
            if eta is not None:
                pairs.append(("eta_seconds", f"{eta:.0f}"))
            self._say(" ".join(f"{name}={value}" for name, value in pairs))
        elif row.kind == "eval":
            metrics = "  ".join(f"{name} {value}" for name, value in self._ordered(row))
            self._say(f"{row.kind}  step {row.step}  {metrics}")
        elif time.monotonic() - self._shown >= _REFRESH_SECONDS:
            self._refresh()

    def _refresh(self) -> None:
        self._fit()
        self._live.refresh()
        self._shown = time.monotonic()

    def note(self, text: str) -> None:
        """Show a message, such as ``checkpoint 300 saved``, that stays above the bar."""
        self._say(text)

    def flush(self) -> None:
        """Show everything written so far."""
        if self._live is None:
            self._stream.flush()
        else:
            self._refresh()

    def close(self) -> None:
        """Show the last state and give the terminal back; later rows become plain lines."""
        if self._live is not None:
            self._refresh()
            self._live.stop()
            self._live = None
