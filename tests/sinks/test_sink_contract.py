"""What every sink has to stand. A new sink is one row in SINKS, and one in STORES if it keeps rows."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fnml.core import Row, RunError
from fnml.sinks import Console, Csv, Jsonl, Prometheus, TensorBoard, read_jsonl, tee

SINKS = {
    "jsonl": lambda path: Jsonl(path / "metrics.jsonl"),
    "csv": lambda path: Csv(path / "metrics.csv"),
    "tensorboard": lambda path: TensorBoard(path / "events"),
    "prometheus": lambda path: Prometheus(port=0, textfile=path / "metrics.prom"),
    "console": lambda path: Console(1000, stream=io.StringIO()),
    "tee": lambda path: tee([Jsonl(path / "metrics.jsonl"), Console(10, stream=io.StringIO())]),
}


def read_csv(path):
    header, *lines = (line.split(",") for line in path.read_text().splitlines())
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    return [(int(row["step"]), row["kind"], float(row["loss"])) for row in rows]


def read_events(path):
    # 0 keeps every scalar; the default keeps a random sample.
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    rows = [
        (event.step, tag.removesuffix("/loss"), event.value)
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
        if tag.endswith("/loss")
    ]
    return sorted(rows, key=lambda row: (row[0], row[1] == "eval"))


STORES = {
    "Jsonl": lambda path: [(row.step, row.kind, row.values["loss"]) for row in read_jsonl(path)],
    "Csv": read_csv,
    "TensorBoard": read_events,
}

sinks = pytest.mark.parametrize("name", SINKS)
stores = pytest.mark.parametrize("name", STORES)


def open_store(name, path, after=None):
    return {"Jsonl": Jsonl, "Csv": Csv, "TensorBoard": TensorBoard}[name](path, after)


@sinks
def test_takes_any_row_and_may_be_closed_twice(name, tmp_path):
    sink = SINKS[name](tmp_path)
    rows = [
        Row(1, "train", {"loss": 0.5}, {"steps_per_second": 2.0}),
        Row(1, "eval", {}),
        Row(2, "train", {"loss": math.nan, 'odd name, "quoted" = ü': -math.inf}, {"seconds": 0.0}),
        Row(3, "eval", {"accuracy": math.inf, "loss": 1e300}, {"data_wait": math.nan}),
        Row(3, "train", {"loss": 5e-324, "count": 7}),
    ]
    for row in rows:
        sink.write(row)
        sink.flush()
    for step in range(4, 200):
        sink.write(Row(step, "train", {"loss": 1 / step, f"new{step % 5}": 1.0}))
    threads = threading.active_count()
    sink.close()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    sink.close()
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == files, "a second close changes nothing"
    assert threading.active_count() <= threads


@sinks
def test_is_named_in_logs(name, tmp_path):
    sink = SINKS[name](tmp_path)
    try:
        assert " object at 0x" not in repr(sink).split("StringIO")[0]
    finally:
        sink.close()


@stores
def test_keeps_every_row_in_order(name, tmp_path):
    path = tmp_path / "made" / "on demand"
    sink = open_store(name, path)
    rows = [
        Row(step, kind, {"loss": 0.5**step}) for step in range(1, 50) for kind in ("train", "eval")
    ]
    for row in rows:
        sink.write(row)
    sink.close()
    assert STORES[name](path) == [(row.step, row.kind, row.values["loss"]) for row in rows]


@stores
def test_a_new_run_does_not_mix_with_an_old_one(name, tmp_path):
    path = tmp_path / "record"
    sink = open_store(name, path)
    sink.write(Row(1, "train", {"loss": 1.0}))
    sink.close()
    with pytest.raises(RunError, match=r"new run would mix.*after="):
        open_store(name, path)
    assert STORES[name](path) == [(1, "train", 1.0)]


@stores
@pytest.mark.parametrize("after", [-1, 0, 3, 4, 9])
def test_continues_after_a_step(name, after, tmp_path):
    path = tmp_path / "record"
    sink = open_store(name, path)
    for step in range(7):
        sink.write(Row(step, "train", {"loss": float(step)}))
        sink.write(Row(step, "eval", {"loss": float(step), "late": 1.0}))
    sink.close()
    sink = open_store(name, path, after=after)
    sink.write(Row(after + 1, "train", {"loss": -1.0}))
    sink.close()
    old = [(step, kind, float(step)) for step in range(7) for kind in ("train", "eval")]
    assert STORES[name](path) == [row for row in old if row[0] <= after] + [
        (after + 1, "train", -1)
    ]


@stores
def test_continues_where_nothing_was_kept(name, tmp_path):
    path = tmp_path / "record"
    sink = open_store(name, path, after=5)
    sink.write(Row(6, "train", {"loss": 1.0}))
    sink.close()
    assert STORES[name](path) == [(6, "train", 1.0)]


RUN = """
    import json, os, signal, sys
    from pathlib import Path
    from fnml.core import Row, write_json
    from fnml import sinks

    name, path, checkpoint, dies_at = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    start = json.loads(checkpoint.read_text()) if checkpoint.exists() else None
    sink = getattr(sinks, name)(path, start if checkpoint.exists() else -1 if dies_at != 5 else None)
    for step in range((start or 0) + 1, 31):
        sink.write(Row(step, "train", {"loss": step / 7}, {"seconds": 1.0}))
        if step % 3 == 0:
            sink.write(Row(step, "eval", {"loss": step / 4, "accuracy": 0.5}))
        if step == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step % 10 == 0:
            sink.flush()
            write_json(checkpoint, step)
    sink.close()
"""


@stores
def test_a_killed_and_continued_run_holds_each_row_once(name, tmp_path):
    path, checkpoint = tmp_path / "record", tmp_path / "step.json"
    # Before the first checkpoint, just before one, right after one, never.
    for dies_at in (5, 19, 21, 0):
        command = [sys.executable, "-W", "error", "-c", textwrap.dedent(RUN)]
        run = subprocess.run([*command, name, path, checkpoint, str(dies_at)], check=False)
        assert run.returncode == (-signal.SIGKILL if dies_at else 0)
    assert json.loads(checkpoint.read_text()) == 30
    expected = []
    for step in range(1, 31):
        expected.append((step, "train", pytest.approx(step / 7, rel=1e-7)))
        if step % 3 == 0:
            expected.append((step, "eval", step / 4))
    assert STORES[name](path) == expected


FULL = """
    import os, resource, sys
    from fnml.core import Row
    from fnml import sinks

    sink = getattr(sinks, sys.argv[1])(sys.argv[2])
    sink.write(Row(1, "train", {"loss": 1.0}))
    room = int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    step = 1
    try:
        while True:
            step += 1
            sink.write(Row(step, "train", {"loss": 1.0}))
    except OSError as error:
        print(step)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    sink.write(Row(step, "train", {"loss": 1.0}))
    sink.close()
"""


@stores
@pytest.mark.parametrize("room", [400, 401, 407])
def test_a_write_that_does_not_fit_leaves_no_half_row(name, room, tmp_path):
    path = tmp_path / "record"
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL), name, path, str(room)],
        capture_output=True,
        text=True,
        check=True,
    )
    failed = int(run.stdout)
    assert 3 < failed < 60
    assert STORES[name](path) == [(step, "train", 1.0) for step in range(1, failed + 1)]


@pytest.mark.parametrize("name", ["Jsonl", "Csv"])
def test_a_file_that_was_removed_is_not_silently_begun_again(name, tmp_path):
    path = tmp_path / "record"
    sink = open_store(name, path)
    sink.write(Row(1, "train", {"loss": 1.0}))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        sink.write(Row(2, "train", {"loss": 1.0}))


def test_importing_the_sinks_imports_no_optional_package():
    code = "import sys, fnml.sinks; print(*sorted(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    modules = set(run.stdout.split())
    assert "fnml.sinks" in modules
    assert not modules & {"rich", "tensorboard", "prometheus_client", "google.protobuf"}
