"""CSV: a rectangular table whatever columns come late, read back by the standard library."""

import csv
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnml.core import ConfigError, DataError, Row
from fnml.sinks import Csv

# A lone surrogate has no UTF-8.
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(
    lambda name: name not in ("step", "kind") and not name.startswith("time/")
)
numbers = st.dictionaries(names, st.floats(), max_size=4)
rows = st.builds(Row, st.integers(0, 99), st.sampled_from(["train", "eval"]), numbers, numbers)


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@settings(deadline=None, max_examples=50)
@given(st.lists(rows, max_size=6), st.integers(-1, 99))
def test_every_number_is_in_its_column_also_after_a_resume(rows, after):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "metrics.csv"
        sink = Csv(path)
        for row in rows[:3]:
            sink.write(row)
        sink.close()
        sink = Csv(path, after)
        for row in rows[3:]:
            sink.write(row)
        sink.close()
        kept = [row for row in rows[:3] if row.step <= after] + rows[3:]
        header, *lines = table(path) or [["step", "kind"]]
        assert len(lines) == len(kept)
        for line, row in zip(lines, kept, strict=True):
            cells = {name: cell for name, cell in zip(header, line, strict=True) if cell}
            timing = {f"time/{name}": value for name, value in row.timing.items()}
            assert cells.pop("step") == str(row.step)
            assert cells.pop("kind") == row.kind
            # repr tells -0.0 from 0.0, and one NaN looks like another.
            expected = {name: repr(value) for name, value in {**row.values, **timing}.items()}
            assert cells == expected


def test_late_columns_widen_the_table_with_metrics_before_timing(tmp_path):
    path = tmp_path / "m.csv"
    sink = Csv(path)
    sink.write(Row(1, "train", {"loss": 0.5}, {"seconds": 1.0}))
    sink.write(Row(1, "eval", {"accuracy": math.nan}))
    sink.write(Row(2, "train", {"loss": 0.25}, {"seconds": 2.0, "data_wait": 0.0}))
    assert table(path) == [
        ["step", "kind", "loss", "accuracy", "time/seconds", "time/data_wait"],
        ["1", "train", "0.5", "", "1.0", ""],
        ["1", "eval", "", "nan", "", ""],
        ["2", "train", "0.25", "", "2.0", "0.0"],
    ]


def test_a_row_of_known_columns_is_appended_and_the_file_is_not_replaced(tmp_path):
    path = tmp_path / "m.csv"
    sink = Csv(path)
    sink.write(Row(1, "train", {"loss": 0.5, "accuracy": 1.0}))
    inode = path.stat().st_ino
    sink.write(Row(1, "eval", {"accuracy": 0.5}))
    assert path.stat().st_ino == inode
    assert len(table(path)) == 3


HEADER = b"step,kind,loss\n"


@pytest.mark.parametrize("tail", [b"3", b"3,train,0.12", b"3,tr\0\0"])
def test_a_torn_last_line_is_dropped_even_if_it_looks_whole(tail, tmp_path):
    path = tmp_path / "m.csv"
    path.write_bytes(HEADER + b"1,train,1.0\n" + tail)
    Csv(path, after=9).write(Row(3, "train", {"loss": 0.125}))
    assert path.read_bytes() == HEADER + b"1,train,1.0\n3,train,0.125\n"


@pytest.mark.parametrize("head", [b"st", b"step,kind,lo"])
def test_a_torn_header_is_dropped(head, tmp_path):
    path = tmp_path / "m.csv"
    path.write_bytes(head)
    Csv(path, after=0)
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"name,age\nAda,36\n", "line 1: the header is 'name,age'"),
        (b"step,kind,loss,loss\n", "line 1: the header"),
        (HEADER + b"1,train,1.0\n2,train\n3,train,1.0\n", "line 3: 2 cells under 3 columns"),
        (HEADER + b"1,train,1.0\n2,train,low\n", "line 3: .*'low'"),
        (HEADER + b"one,train,1.0\n", "line 2: .*'one'"),
        (HEADER + b"1,train,1.0\n2,train,\xff\n", "line 3: byte 0xff"),
        (HEADER + b'1,train,"1.0\n', "line 2: "),
        (b"a precious letter without a newline", "line 1: the header"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_and_unchanged(data, where, tmp_path):
    path = tmp_path / "m.csv"
    path.write_bytes(data)
    with pytest.raises(DataError, match=where):
        Csv(path, after=1)
    assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["step", "kind", "time/seconds"])
def test_a_metric_with_a_name_of_ours_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match=f"'{name}'.*rename"):
        Csv(tmp_path / "m.csv").write(Row(1, "train", {name: 1.0}, {"seconds": 1.0}))
