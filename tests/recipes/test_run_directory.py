"""Run directories: who may use which, and what is said to the others."""

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fnml.core import RunError
from fnml.recipes import new_directory, read_record, read_result
from fnml.recipes._run_directory import create, locked, write_result

RECORD = {"recipe": "digits", "config": {"run": {"steps": 3}}, "output": {}}
RESULT = {
    "recipe": "digits",
    "step": 3,
    "stopped": None,
    "train": {"loss": 0.5},
    "eval": {"loss": 0.25},
    "seconds": 1.5,
    "params_sha256": "ab" * 32,
}


def test_what_is_created_can_be_read(tmp_path):
    directory = tmp_path / "a" / "b"
    create(directory, RECORD, {"tokenizer.json": b"{}"})
    assert read_record(directory) == {"format": 1, **RECORD}
    assert (directory / "tokenizer.json").read_bytes() == b"{}"
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "tokenizer.json"]


def test_an_empty_directory_may_be_used(tmp_path):
    create(tmp_path, RECORD, {})
    assert read_record(tmp_path)["recipe"] == "digits"


def test_another_runs_directory_is_refused_and_left_alone(tmp_path):
    create(tmp_path, RECORD, {})
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(RunError, match=f"holds another run.*fnml resume {tmp_path}.*--out"):
        create(tmp_path, {**RECORD, "recipe": "lm"}, {"tokenizer.json": b""})
    assert (tmp_path / "config.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_directory_with_other_things_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match="is not empty and holds no run"):
        create(tmp_path, RECORD, {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300])
def test_a_directory_that_cannot_be_made_is_named(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot be used for a run: .*(Not a dir|too long)"):
        create(tmp_path / name, RECORD, {})


def test_new_directories_are_made_and_never_shared(tmp_path, monkeypatch):
    found = []
    mkdir = Path.mkdir

    def slow(path, *arguments, **options):
        # Runs that are started together look, and only then make: give them time between.
        time.sleep(0.001)
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", slow)
    barrier = threading.Barrier(8)

    def make():
        barrier.wait()
        found.extend(new_directory(tmp_path / "runs", "digits") for _ in range(5))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 40
    assert all(path.is_dir() for path in found)
    assert all(re.fullmatch(r"digits-\d{8}-\d{6}(-\d+)?", path.name) for path in found)


@pytest.mark.parametrize("parent", ["file", "dangling"])
def test_a_parent_that_is_no_directory_is_named(tmp_path, parent):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    with pytest.raises(RunError, match=f"{parent}.*cannot be used for a run"):
        new_directory(tmp_path / parent, "digits")


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(RunError, match=r"there is no run directory .*nowhere"):
        read_record(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"holds no run: it has no config\.json"):
        read_record(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(RunError, match="holds no run"):
        read_record(tmp_path)


def test_a_pipe_in_the_way_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(RunError, match="holds no run"):
        read_record(tmp_path)


GOOD = {"format": 1, **RECORD}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"format": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b" " * (1 << 20) + b"{}", "1048578 bytes, more than any record has"),
        (b"[]", "expected a JSON object, got list"),
        (b"null", "expected a JSON object, got NoneType"),
        (b"{}", "has format None, this version reads 1"),
        (json.dumps({**GOOD, "format": 2}).encode(), "has format 2, this version reads 1"),
        (json.dumps({**GOOD, "recipe": 3}).encode(), "is damaged: 'recipe' is 3"),
        (json.dumps({**GOOD, "config": None}).encode(), "is damaged: 'config' is None"),
        (json.dumps({**GOOD, "output": []}).encode(), r"is damaged: 'output' is \[\]"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RunError, match=f"config.json.*{message}"):
        read_record(tmp_path)


def test_results_come_back_with_every_float(tmp_path):
    assert read_result(tmp_path) is None
    values = {"loss": math.inf, "worse": -math.inf, "none": math.nan, "fine": 0.1}
    write_result(tmp_path, {**RESULT, "eval": values})
    json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    result = read_result(tmp_path)
    assert math.isnan(result["eval"].pop("none"))
    assert result == {**RESULT, "eval": {"loss": math.inf, "worse": -math.inf, "fine": 0.1}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", "3"),
        ("seconds", None),
        ("params_sha256", 5),
        ("recipe", []),
        ("eval", 3),
        ("eval", {"loss": "low"}),
        ("train", {"loss": []}),
        ("train", None),
    ],
)
def test_a_damaged_result_is_refused(tmp_path, field, value):
    (tmp_path / "result.json").write_text(json.dumps({**RESULT, field: value}))
    with pytest.raises(RunError, match=f"result.json is damaged: '{field}' is"):
        read_result(tmp_path)


HOLD = """
import sys
from pathlib import Path
from fnml.recipes._run_directory import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_is_locked_for_as_long_as_its_process_lives(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with (
                pytest.raises(RunError, match=f"in use by process {other.pid}: wait for it"),
                locked(tmp_path),
            ):
                pytest.fail("two processes hold one run")
        finally:
            other.kill()
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
