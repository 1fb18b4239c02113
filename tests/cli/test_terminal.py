"""The command line as a process: pipes, terminals, encodings, and whoever stops listening."""

import contextlib
import os
import pty
import subprocess
import sys

import pytest
from rich.cells import cell_len

import fnml
from fnml.cli import main
from fnml.sinks import read_jsonl

DIGITS = [
    *["train", "digits", "--network", "mlp", "--mlp.hidden", "16", "--batch-size", "32"],
    *["--log-every", "5", "--eval-every", "20", "--save-every", "20", "--steps", "40"],
]


def run(*arguments, shell=None, **environment):
    """Run ``python -m fnml``, or a shell line in which ``fnml`` stands for it."""
    command = [sys.executable, "-m", "fnml", *map(str, arguments)]
    if shell is not None:
        command = ["bash", "-c", shell.replace("fnml ", f"{sys.executable} -m fnml ")]
    return subprocess.run(
        command,
        capture_output=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A finished run, whose name no Latin-1 terminal can show."""
    directory = tmp_path_factory.mktemp("terminal") / "数"
    with pytest.raises(SystemExit):
        main([*DIGITS, "--quiet", "--out", str(directory)])
    return directory


def test_python_m_fnml_is_the_command_line():
    done = run("--version")
    assert (done.returncode, done.stdout.decode()) == (0, f"fnml {fnml.__version__}\n")
    assert done.stderr == b""


def test_piped_training_is_plain_lines(directory):
    out = directory.parent / "piped"
    done = run(*DIGITS, "--out", out)
    assert done.returncode == 0
    assert b"\x1b" not in done.stdout + done.stderr and b"\r" not in done.stdout + done.stderr
    # Progress is not the result: it goes to stderr, one line for each row.
    lines = done.stderr.decode().splitlines()
    assert len(lines) == len(read_jsonl(out / "metrics.jsonl")) == 8 + 2
    assert lines[0].startswith("step=5/40 kind=train loss=")
    first, second = done.stdout.decode().splitlines()
    assert first.startswith(f"{out}: 40 steps in ") and second.startswith("params_sha256 ")


def test_piped_tables_are_plain_and_whole(directory):
    done = run("runs", directory, directory, COLUMNS="40")
    assert done.returncode == 0
    assert b"\x1b" not in done.stdout
    text = done.stdout.decode()
    assert "…" not in text and str(directory) in text
    assert len({cell_len(line) for line in text.splitlines()}) == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["--help", "eval '{run}'", "runs '{run}' '{run}'"])
def test_a_reader_that_goes_away_is_no_error(directory, command, unbuffered):
    line = command.format(run=directory)
    shell = f"fnml {line} | true; echo ${{PIPESTATUS[0]}}"
    done = run(shell=shell, PYTHONUNBUFFERED=unbuffered)
    assert (done.stdout, done.stderr) == (b"141\n", b"")


def test_head_takes_one_line_of_help():
    done = run(shell="fnml train digits --help | head -1; echo ${PIPESTATUS[0]}")
    first, code = done.stdout.decode().splitlines()
    assert first.startswith("usage: fnml train digits")
    assert code in ("0", "141") and done.stderr == b""


def test_a_run_goes_on_when_nobody_reads_its_progress(directory):
    out = directory.parent / "headed"
    line = f"fnml {' '.join(DIGITS)} --out {out} 2>&1 | head -1; echo ${{PIPESTATUS[0]}}"
    done = run(shell=line)
    first, code = done.stdout.decode().splitlines()
    assert first.startswith("step=5/40 kind=train")
    # The run is whole; only its last words found no reader.
    assert code == "141"
    assert (out / "result.json").exists()
    assert done.stderr == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")  # noqa: PTH110
def test_output_onto_a_full_disk_is_said():
    done = run(shell="fnml --help > /dev/full")
    assert done.returncode == 1
    assert done.stderr == b"fnml: [Errno 28] No space left on device\n"
    assert run(shell="fnml nonsense 2> /dev/full").returncode in (1, 2)


def test_closed_output_is_like_no_output(directory):
    for shell in ("fnml --help >&-", "fnml doctor >&-", f"fnml eval '{directory}' >&- 2>&-"):
        done = run(shell=shell)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_an_encoding_without_the_letters_escapes_them(directory):
    done = run("runs", directory, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    done.stdout.decode("ascii")
    assert b"\\u6570" in done.stdout
    done = run("eval", directory.parent / "数数", PYTHONIOENCODING="latin-1")
    assert done.returncode == 1
    assert b"no run directory" in done.stderr and b"\\u6570\\u6570" in done.stderr


def test_a_name_that_is_no_text_is_refused_before_training(directory):
    name = os.fsencode(directory.parent) + b"/\xff\xfe"
    command = [sys.executable, "-m", "fnml", *DIGITS, "--out", name]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.count(b"\n") == 1
    assert b"\\udcff\\udcfe is no UTF-8 name" in done.stderr
    assert not os.path.exists(name)  # noqa: PTH110 (a Path would do; bytes are the point)


def on_a_terminal(*arguments):
    """Run ``fnml`` on a terminal of its own; return its exit code and all that it showed."""
    ours, theirs = pty.openpty()
    shown = bytearray()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "fnml", *map(str, arguments)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm-256color"},
        )
        os.close(theirs)
        # Linux says EIO when the last writer has closed the terminal.
        with contextlib.suppress(OSError):
            while data := os.read(ours, 65536):
                shown += data
        return process.wait(timeout=120), shown.decode()
    finally:
        os.close(ours)


def test_a_terminal_shows_a_bar_and_gets_its_cursor_back(directory):
    code, shown = on_a_terminal(*DIGITS, "--out", directory.parent / "bar")
    assert code == 0
    assert "━" in shown and "40/40" in shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")
    assert "params_sha256" in shown


def test_quiet_shows_the_result_only(directory):
    code, shown = on_a_terminal(*DIGITS, "--quiet", "--out", directory.parent / "quiet")
    assert code == 0
    assert "\x1b" not in shown
    assert len(shown.split("\r\n")) == 3
