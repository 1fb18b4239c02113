"""fnml bench: its tables are those of its JSON, in the documentation too."""

import json
from pathlib import Path

import pytest

import fnml
from fnml.cli import _bench, main
from fnml.core import DataError

ROOT = Path(fnml.__file__).resolve().parents[1]
HAS_SCRIPTS = (ROOT / "benchmarks").is_dir()
REPORT = {
    "command": "python benchmarks/startup.py",
    "machine": {"processor": "a CPU", "cpus": "2", "jax": "0.10"},
    "tables": [{"title": "T", "columns": ["who", "s"], "rows": [["a|b", "1.0"], ["c", "2.0"]]}],
}
TABLE = """**T**

| who | s |
|---|---|
| a\\|b | 1.0 |
| c | 2.0 |

`python benchmarks/startup.py`: processor a CPU, cpus 2, jax 0.10.
"""


def test_a_report_becomes_markdown():
    assert _bench.markdown(REPORT) == TABLE


def test_the_report_of_the_peers_becomes_a_table_for_each_row():
    peer = {
        "ms": 2.0, "ms_range": [1.5, 2.5], "share_of_matmul": 0.612, "peak_mib": 300.4,
        "first_step_s": 3.21, "loss": 1.234567,
    }  # fmt: skip
    row = {"matmul_gflops": 430.2, "ratios": {"over_torch": 1.512}, "peers": {"fnml": peer}}
    text = _bench.markdown({"machine": {"cpus": 2}, "rows": {"gpt_small": row}})
    assert "**gpt_small (matrix product: 430 GFLOP/s, over torch: 1.51)**" in text
    assert "| fnml | 2.00 | 1.50-2.50 | 61% | 300 | 3.2 | 1.23457 |" in text


def test_marked_blocks_are_made_from_the_results_and_the_rest_stays(tmp_path):
    (tmp_path / "startup.json").write_text(json.dumps(REPORT))
    marked = "before\n<!-- bench:startup -->\nold\n<!-- /bench:startup -->\nafter\n"
    new = _bench.with_tables(marked, tmp_path)
    assert new == f"before\n<!-- bench:startup -->\n{TABLE}<!-- /bench:startup -->\nafter\n"
    assert _bench.with_tables(new, tmp_path) == new
    with pytest.raises(DataError, match=r"data\.json cannot be read"):
        _bench.with_tables("<!-- bench:data -->\n<!-- /bench:data -->", tmp_path)


@pytest.mark.skipif(not HAS_SCRIPTS, reason="the benchmarks are in the repository only")
def test_the_committed_tables_are_those_of_the_committed_results():
    results = ROOT / "benchmarks" / "results"
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    texts = {path: path.read_text(encoding="utf-8") for path in documents}
    assert sum(text.count("<!-- bench:") for text in texts.values()) >= 3
    for path, text in texts.items():
        assert _bench.with_tables(text, results) == text, f"run 'fnml bench --tables' for {path}"


@pytest.mark.skipif(not HAS_SCRIPTS, reason="the benchmarks are in the repository only")
def test_every_suite_has_its_script():
    assert set(_bench._SCRIPTS) == set(_bench.Suite.__args__)
    for script in _bench._SCRIPTS.values():
        text = (ROOT / "benchmarks" / script.name).read_text(encoding="utf-8")
        assert '"--json"' in text and f'"{script.rounds}"' in text


@pytest.mark.skipif(not HAS_SCRIPTS, reason="the benchmarks are in the repository only")
def test_a_suite_runs_and_writes_its_table_twice(tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        main(["bench", "data", "--rounds", "1", "--out", str(tmp_path), "--peers", str(tmp_path)])
    assert end.value.code == 0
    text = (tmp_path / "data.md").read_text()
    assert text == _bench.markdown(json.loads((tmp_path / "data.json").read_text()))
    assert text in capfd.readouterr().out
    assert "| NumPy by hand |" in text and "python benchmarks/data.py --rounds 1`" in text


def test_what_cannot_be_is_refused_by_one_sentence(tmp_path, monkeypatch, capfd):
    def code(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["bench", *arguments])
        return end.value.code

    assert code() == 2 and "name a suite" in capfd.readouterr().err
    assert code("data", "--rounds", "-1") == 2 and "rounds=-1" in capfd.readouterr().err
    monkeypatch.setattr(_bench.fnml, "__file__", str(tmp_path / "fnml" / "__init__.py"))
    assert code("data") == 1 and "not in the wheel" in capfd.readouterr().err
    # Nothing can be installed where there is a file.
    (tmp_path / "file").write_text("")
    assert code("--install-peers", str(tmp_path / "file")) == 1
