"""The console: on a real pseudo-terminal, and plain when piped."""

import fcntl
import io
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap
import threading

import pytest

from fnml.core import ConfigError, Row
from fnml.sinks import Console

TIMING = {
    "steps_per_second": 12.5,
    "samples_per_second": 16123.4,
    "data_wait": 0.031,
    "compile_seconds": 3.24,
    "seconds": 61.0,
}


class Terminal:
    """A pseudo-terminal of a size, and the bytes that a program sent to it."""

    def __init__(self, columns, rows=24):
        self._main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.stream = os.fdopen(side, "w", encoding="utf-8")
        self._chunks = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        # Linux reports the closed other side as an input/output error.
        try:
            while chunk := os.read(self._main, 65536):
                self._chunks.append(chunk)
        except OSError:
            pass

    def text(self):
        """Close the stream and return all that was sent."""
        self.stream.close()
        self._reader.join()
        os.close(self._main)
        return b"".join(self._chunks).decode()


CODES = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+")


def screen(text):
    """Play the codes that matter, and return the lines that a person would see."""
    lines, row, column = [""], 0, 0
    for code in CODES.finditer(text):
        argument, letter = code.groups()
        if letter == "A":
            row -= int(argument or 1)
        elif letter == "K":
            assert argument == "2"
            lines[row] = ""
        elif letter is not None:
            assert letter in "mhl", code.group()
        elif code.group() == "\r":
            column = 0
        elif code.group() == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + code.group() + line[column + len(code.group()) :]
            column += len(code.group())
    return [line.rstrip() for line in lines]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def show(terminal, start=0):
    console = Console(1000, stream=terminal.stream, start=start)
    console.write(Row(start + 10, "train", {"rate": 0.001, "loss": math.nan}, TIMING))
    console.write(Row(start + 10, "eval", {"accuracy": 0.5}))
    console.note("checkpoint 310 saved")
    console.write(Row(start + 20, "train", {"rate": 0.001, "loss": 0.25}, TIMING))
    console.close()
    return screen(terminal.text())


def test_on_a_terminal_the_bar_stays_below_evaluations_and_notes():
    first, second, bar, numbers, *rest = show(Terminal(120), start=300)
    assert first == "eval  step 310  accuracy 0.5"
    assert second == "checkpoint 310 saved"
    assert re.fullmatch(r"━+╺?━+ 320/1000  eta 0:00:54", bar)
    assert len(bar) <= 120
    assert numbers == (
        "loss 0.25  rate 0.001  12.5 steps/s  16123 samples/s  data wait 3.1%  compile 3.2s"
    )
    assert rest == [""]


def test_the_bar_starts_at_the_step_of_the_checkpoint():
    terminal = Terminal(80)
    console = Console(1000, stream=terminal.stream, start=750)
    console.close()
    text = terminal.text()
    assert "750/1000" in screen(text)[0]
    # rich draws the done part in one colour and the rest in another.
    parts = re.findall(r"[━╸╺]+", text[text.rindex("\x1b[2K") :])
    assert len(parts[0]) / sum(map(len, parts)) == pytest.approx(0.75, abs=0.02)


def test_nan_is_shown():
    terminal = Terminal(80)
    console = Console(10, stream=terminal.stream)
    console.write(Row(1, "train", {"loss": math.nan, "worst": -math.inf}))
    console.close()
    assert "loss nan  worst -inf" in screen(terminal.text())


@pytest.mark.parametrize("columns", [1, 2, 5, 13, 40])
def test_a_narrow_terminal_cuts_the_two_lines_and_no_more(columns):
    lines = show(Terminal(columns))
    assert lines[:2] == ["eval  step 10  accuracy 0.5", "checkpoint 310 saved"]
    assert len(lines) == 5
    assert all(len(line) <= columns for line in lines[2:])
    assert "loss 0.25  rate 0.001  12.5 steps/s  16123".startswith(lines[3])
    assert lines[3]


def test_a_terminal_of_unknown_size_works():
    assert "20/1000" in show(Terminal(0, 0))[2]


def test_a_change_of_size_is_followed():
    terminal = Terminal(120)
    console = Console(1000, stream=terminal.stream)
    fcntl.ioctl(terminal.stream, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 30, 0, 0))
    console.flush()
    console.close()
    last = screen(terminal.text().rsplit("\x1b[2K", 1)[1])[0]
    assert len(last) == 30


def test_the_cursor_is_left_visible_also_without_close():
    terminal = Terminal(80)
    console = Console(1000, stream=terminal.stream)
    console.write(Row(1, "train", {"loss": 1.0}))
    codes = re.findall(r"\?25[lh]", terminal.text())
    assert codes[-1] == "?25h"
    # Let go of the display, whose terminal is gone.
    console._live = None


def test_fast_rows_do_not_cost_a_drawing_each():
    terminal = Terminal(80)
    console = Console(10**6, stream=terminal.stream)
    for step in range(2000):
        console.write(Row(step, "train", {"loss": 1.0}))
    console.close()
    text = terminal.text()
    assert "1999/1000000" in screen(text)[0]
    assert text.count("/1000000") < 200


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal(80)
    console = Console(10, stream=terminal.stream)
    console.write(Row(1, "train", {"loss": 1.0}))
    console.close()
    assert terminal.text() == "step=1/10 kind=train loss=1\r\n"


def test_prints_and_logs_appear_above_the_bar():
    code = """
        import logging, sys
        from fnml.core import Row
        from fnml.sinks import Console

        console = Console(10)
        logging.basicConfig(format="%(message)s")
        console.write(Row(1, "train", {"loss": 1.0}))
        print("printed by a callback")
        logging.warning("logged by a library")
        before = sys.stdout
        console.close()
        assert sys.stdout is not before
        print("afterwards")
    """
    terminal = Terminal(80)
    subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        stdout=terminal.stream,
        stderr=terminal.stream,
        check=True,
    )
    lines = screen(terminal.text())
    assert lines[:2] == ["printed by a callback", "logged by a library"]
    assert "1/10" in lines[2]
    assert lines[3:] == ["loss 1", "afterwards", ""]


def piped(*rows, **options):
    stream = io.StringIO()
    console = Console(1000, stream=stream, **options)
    for row in rows:
        console.write(row)
    console.close()
    return stream.getvalue()


def test_piped_lines_are_plain_and_in_a_fixed_order():
    text = piped(
        Row(300, "train", {"rate": 1e-5, "accuracy": 1 / 3, "loss": math.nan}, TIMING),
        Row(300, "eval", {"perplexity": 123456.7, "loss": math.inf}),
        Row(310, "train", {}),
    )
    assert text == (
        "step=300/1000 kind=train loss=nan accuracy=0.33333 rate=1e-05 steps_per_second=12.5 "
        "samples_per_second=16123 data_wait=0.031 compile_seconds=3.24 seconds=61 eta_seconds=56\n"
        "step=300/1000 kind=eval loss=inf perplexity=123457\n"
        "step=310/1000 kind=train\n"
    )


def test_the_order_of_metrics_can_be_chosen():
    row = Row(1, "train", {"a": 1.0, "b": 2.0, "c": 3.0})
    assert piped(row, metrics=("c", "absent")) == "step=1/1000 kind=train c=3 a=1 b=2\n"


def test_a_name_with_spaces_stays_one_key():
    text = piped(Row(1, "train", {"top 5\taccuracy": 1.0}))
    assert text == "step=1/1000 kind=train top_5_accuracy=1\n"


@pytest.mark.parametrize("speed", [0.0, math.nan, math.inf, -1.0, 1e-300])
def test_an_absurd_speed_does_no_harm(speed):
    row = Row(1, "train", {}, {"steps_per_second": speed})
    text = piped(row)
    assert text.startswith("step=1/1000 kind=train steps_per_second=")
    assert ("eta" in text) == (speed == math.inf)
    terminal = Terminal(80)
    console = Console(1000, stream=terminal.stream)
    console.write(row)
    console.close()
    assert "1/1000" in screen(terminal.text())[0]


def test_each_piped_row_is_visible_at_once():
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream, os.fdopen(reader, "rb", buffering=0) as lines:
        os.set_blocking(reader, False)
        console = Console(10, stream=stream)
        console.write(Row(1, "train", {"loss": 1.0}))
        assert lines.read(100) == b"step=1/10 kind=train loss=1\n"
        console.close()


def test_a_stream_without_the_letters_gets_their_codes():
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii") as stream:
        Console(10, stream=stream).write(Row(1, "train", {"größe": 1.0}))
        assert raw.getvalue() == rb"step=1/10 kind=train gr\xf6\xdfe=1" + b"\n"


def test_after_close_rows_are_plain_lines():
    terminal = Terminal(80)
    console = Console(10, stream=terminal.stream)
    console.close()
    console.write(Row(10, "eval", {"loss": 1.0}))
    assert screen(terminal.text())[1] == "step=10/10 kind=eval loss=1"


def test_total_steps_has_to_be_positive():
    with pytest.raises(ConfigError, match="total_steps is 0"):
        Console(0)
