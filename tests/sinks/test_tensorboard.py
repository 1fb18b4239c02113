"""TensorBoard: read by its own reader, also after starts in one second and torn files."""

import math
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fnml.core
from fnml.core import MissingExtraError, Row
from fnml.sinks import TensorBoard


def scalars(directory):
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def train(directory, first, last, after=None, value=1.0):
    sink = TensorBoard(directory, after)
    for step in range(first, last + 1):
        sink.write(Row(step, "train", {"loss": value}))
    sink.flush()
    return sink


def test_tags_and_values(tmp_path):
    sink = TensorBoard(tmp_path)
    before = time.time()
    sink.write(Row(1, "train", {"loss": 0.1}, {"steps_per_second": 12.5}))
    sink.write(Row(1, "eval", {"accuracy": math.nan, "loss": -math.inf, "huge": 1e300}))
    sink.close()
    found = scalars(tmp_path)
    assert found.keys() == {
        "train/loss",
        "time/steps_per_second",
        "eval/accuracy",
        "eval/loss",
        "eval/huge",
    }
    assert found["train/loss"] == [(1, float(np.float32(0.1)))]
    assert found["time/steps_per_second"] == [(1, 12.5)]
    assert math.isnan(found["eval/accuracy"][0][1])
    assert found["eval/loss"] == [(1, -math.inf)]
    assert found["eval/huge"] == [(1, math.inf)]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert before <= events.Scalars("train/loss")[0].wall_time <= time.time()


def test_many_starts_within_a_second_are_read_in_their_order(tmp_path):
    train(tmp_path, 1, 4)
    for start in range(1, 12):
        train(tmp_path, start + 1, start + 3, after=start, value=float(start))
    assert len(list(tmp_path.iterdir())) == 12
    kept = [(start + 1, float(start)) for start in range(1, 12)]
    assert scalars(tmp_path)["train/loss"] == [(1, 1.0), *kept, (13, 11.0), (14, 11.0)]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_record_hides_nothing_but_itself(cut, tmp_path):
    train(tmp_path, 1, 6)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-cut])
    train(tmp_path, 5, 8, after=4, value=2.0)
    expected = [(step, 1.0 if step <= 4 else 2.0) for step in range(1, 9)]
    assert scalars(tmp_path)["train/loss"] == expected


def test_a_reader_that_follows_the_run_forgets_what_was_undone(tmp_path):
    first = train(tmp_path, 1, 6)
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    first.close()
    train(tmp_path, 4, 5, after=3)
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_needs_no_tensorflow_and_warns_of_nothing(tmp_path):
    code = """
        import sys
        from fnml.core import Row
        from fnml.sinks import TensorBoard

        sink = TensorBoard(sys.argv[1])
        sink.write(Row(1, "train", {"loss": 0.5}))
        sink.close()
        print("tensorflow" in sys.modules)
    """
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (run.stdout, run.stderr) == ("False\n", "")
    assert scalars(tmp_path) == {"train/loss": [(1, 0.5)]}


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    # None in sys.modules makes an import fail as if the package were not there.
    for module in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fnml\[tensorboard\]'"):
        TensorBoard(tmp_path / "events")
    assert not (tmp_path / "events").exists()
    assert issubclass(MissingExtraError, fnml.core.FnmlError)
