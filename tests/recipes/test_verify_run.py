"""What is wrong with a run directory is found, and named."""

import json
import shutil

import pytest
from run_processes import QUIET, digits, fnml

from fnml.checkpoint import Checkpointer, restore
from fnml.core import RunError
from fnml.recipes import start, verify_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("verify") / "run"
    start("digits", digits(run={"log_every": 4, "keep_last": 9}), directory, QUIET)
    return directory


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def problems(run):
    return [tuple(finding) for finding in verify_run(run).findings]


def test_a_whole_run_has_no_findings(run, capsys):
    found = verify_run(run)
    assert found.findings == []
    assert found.steps == {5: [], 10: [], 12: []}
    assert fnml("verify", run) == 0
    assert "nothing is damaged" in capsys.readouterr().out
    assert verify_run(run / "checkpoints").findings == []


def test_a_flipped_bit_is_found_and_its_file_named(run, capsys):
    step = run / "checkpoints" / "00000010"
    files = [path for path in (step / "arrays").rglob("*") if path.is_file()]
    file = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    ((where, problem),) = problems(run)
    assert where == "step 10"
    assert problem.startswith(file.relative_to(step).as_posix() + " has sha256")
    assert fnml("verify", run) == 1
    assert "step 10" in capsys.readouterr().out


def test_a_result_that_is_not_its_checkpoints(run):
    path = run / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps({**result, "params_sha256": "0" * 64}))
    ((where, problem),) = problems(run)
    assert where == "result.json"
    assert result["params_sha256"] in problem
    path.write_text(json.dumps({**result, "step": 11}))
    assert problems(run) == [("result.json", "its step 11 has no whole checkpoint")]
    path.write_text("{")
    assert [where for where, _ in problems(run)] == ["result.json"]


def test_rows_that_are_there_twice_or_out_of_order(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[0]]))
    assert [where for where, _ in problems(run)] == ["metrics.jsonl"] * 2
    path.write_text("".join(lines[:-1]) + "nonsense\n")
    ((where, problem),) = problems(run)
    assert where == "metrics.jsonl" and f"line {len(lines)}" in problem


def test_a_position_that_is_not_the_steps(run):
    found = restore(run / "checkpoints", step=10)
    found.meta["data"]["position"] += 1
    shutil.rmtree(run / "checkpoints" / "00000010")
    with Checkpointer(run / "checkpoints", keep_last=9) as keeper:
        keeper.save(10, found.state, found.meta)
    assert problems(run) == [("step 10", "321 examples are counted, expected 320")]


def test_a_record_that_cannot_be_read(run):
    (run / "config.json").write_text("[]")
    assert "config.json" in [where for where, _ in problems(run)]


def test_what_is_no_run_is_refused(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(RunError, match="holds neither a run nor checkpoints"):
            verify_run(path)
    assert fnml("verify", tmp_path) == 1
    assert "Traceback" not in capsys.readouterr().err
