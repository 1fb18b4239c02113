"""Atomic files: the old one or the new one, and nothing left over."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from fnml.core import fsync_directory, write_atomic, write_json


def test_it_writes_and_replaces(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "rename", "write"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_keeps_the_old_file_and_leaves_nothing(call, error, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_):
        raise error

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    elif call == "rename":
        monkeypatch.setattr(type(path), "replace", fail)
    else:
        # A directory where the temporary file should go makes opening it fail.
        monkeypatch.setattr(type(path), "open", fail)
    with pytest.raises(type(error)):
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fills_up_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = """
        import resource, sys
        from pathlib import Path
        from fnml.core import write_atomic

        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_atomic(Path(sys.argv[1]), b"x" * 5000)
        except OSError as error:
            print(type(error).__name__)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), path]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == "OSError\n"
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_process_killed_before_the_rename_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = """
        import os, signal, sys
        from pathlib import Path
        from fnml.core import write_atomic

        os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
        write_atomic(Path(sys.argv[1]), b"new")
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code), path], check=False)
    assert run.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


def test_a_missing_directory_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "absent" / "file", b"x")
    with pytest.raises(FileNotFoundError):
        fsync_directory(tmp_path / "absent")


def test_json_is_strict_and_readable(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"b": [1, 0.1], "a": None})
    assert json.loads(path.read_text()) == {"b": [1, 0.1], "a": None}
    assert path.read_text().endswith("}\n")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            write_json(path, {"x": bad})
    assert json.loads(path.read_text())["b"] == [1, 0.1]
