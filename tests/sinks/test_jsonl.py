"""JSON lines: exact floats, strict JSON, and files that are damaged or not ours."""

import json
import math
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnml.core import ConfigError, DataError, Row
from fnml.sinks import Jsonl, read_jsonl

names = st.text(max_size=8).filter(lambda name: name not in ("step", "kind", "timing"))
numbers = st.dictionaries(names, st.floats(), max_size=4)
rows = st.builds(Row, st.integers(0, 2**53), st.sampled_from(["train", "eval"]), numbers, numbers)


def refuse_constant(word):
    raise AssertionError(f"{word} is not JSON")


def bits(row):
    def packed(numbers):
        # Which NaN it was is not kept, only that it was one.
        return [
            (name, "nan" if math.isnan(value) else struct.pack("d", value))
            for name, value in numbers.items()
        ]

    return row.step, row.kind, packed(row.values), packed(row.timing)


@settings(deadline=None)
@given(st.lists(rows, max_size=5))
def test_rows_read_back_bit_for_bit_and_every_line_is_strict_json(rows):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "metrics.jsonl"
        sink = Jsonl(path)
        for row in rows:
            sink.write(row)
        sink.close()
        assert [bits(row) for row in read_jsonl(path)] == [bits(row) for row in rows]
        for line in path.read_text().splitlines():
            json.loads(line, parse_constant=refuse_constant)


def test_the_format(tmp_path):
    sink = Jsonl(tmp_path / "m")
    values = {"loss": np.float32(0.1), "worst": math.inf, "best": -math.inf, "none": math.nan}
    sink.write(Row(np.int32(3), "eval", values, {"seconds": 2.0}))
    assert json.loads((tmp_path / "m").read_text()) == {
        "step": 3,
        "kind": "eval",
        "loss": 0.10000000149011612,
        "worst": "Infinity",
        "best": "-Infinity",
        "none": "NaN",
        "timing": {"seconds": 2.0},
    }


def lines(*steps):
    return b"".join(b'{"step": %d, "kind": "train", "loss": 1.0}\n' % step for step in steps)


@pytest.mark.parametrize("tail", [b'{"step": 3, "ki', b"{", b"\0\0\0", b'{"step": 3, "k\0\0'])
def test_a_torn_last_line_is_dropped(tail, tmp_path):
    path = tmp_path / "m"
    path.write_bytes(lines(1, 2) + tail)
    assert [row.step for row in read_jsonl(path)] == [1, 2]
    Jsonl(path, after=9).write(Row(3, "train", {"loss": 1.0}))
    assert path.read_bytes() == lines(1, 2, 3)


def test_a_torn_first_line_is_dropped(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(b'{"ste')
    Jsonl(path, after=0)
    assert path.read_bytes() == b""


def test_a_last_line_that_only_lacks_its_newline_is_kept(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(lines(1, 2)[:-1])
    Jsonl(path, after=2).write(Row(3, "train", {"loss": 1.0}))
    assert path.read_bytes() == lines(1, 2, 3)


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (lines(1) + b"oops\n" + lines(2), "line 2: .*Expecting value"),
        (lines(1) + b"\xff\xfe\n" + lines(2), "line 2: "),
        (b"[1, 2]\n", "line 1: a JSON list, not an object"),
        (b'{"loss": 1.0}\n', "line 1: 'step' is None, not an integer"),
        (b'{"step": true, "kind": "train"}\n', "line 1: 'step' is True"),
        (b'{"step": 1, "kind": "test"}\n', "line 1: 'kind' is 'test'"),
        (lines(1, 2) + b'{"step": 3, "kind": "eval", "loss": "low"}\n', "line 3: 'loss' is 'low'"),
        (b'{"step": 1, "kind": "train", "timing": 3}\n', "line 1: 'timing' is 3"),
        (b"a precious letter without a newline", "line 1: "),
    ],
)
def test_a_file_that_is_not_ours_is_refused_and_unchanged(data, where, tmp_path):
    path = tmp_path / "m"
    path.write_bytes(data)
    with pytest.raises(DataError, match=where):
        Jsonl(path, after=1)
    assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(DataError, match=where):
        read_jsonl(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no file .*absent"):
        read_jsonl(tmp_path / "absent")


@pytest.mark.parametrize("name", ["step", "kind", "timing"])
def test_a_metric_with_a_name_of_ours_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match=f"'{name}'.*rename"):
        Jsonl(tmp_path / "m").write(Row(1, "train", {name: 1.0}))
    assert read_jsonl(tmp_path / "m") == []


def test_a_change_of_directory_does_not_move_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sink = Jsonl("m")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    sink.write(Row(1, "train", {"loss": 1.0}))
    assert (tmp_path / "m").read_bytes() == lines(1)
