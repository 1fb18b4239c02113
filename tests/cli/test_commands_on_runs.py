"""``fnml eval|sample|runs|doctor`` on real runs, and on what is not one."""

import json
import re
import shutil

import jax
import pytest

import fnml
from fnml.cli import main
from fnml.recipes import Output, find_recipe, from_json, read_result, start

RUN = {"steps": 6, "batch_size": 16, "save_every": 3, "eval_every": 3, "fuse": 3}
MLP = {"inputs": 64, "hidden": [8], "outputs": 10}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two small digits runs, one language model, one run that has not finished."""
    root = tmp_path_factory.mktemp("runs")
    text = root / "text"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 40)
    digits, lm = find_recipe("digits").config, find_recipe("lm").config
    for name, seed in (("one", 0), ("two", 1)):
        config = from_json(digits, {"network": "mlp", "mlp": MLP, "run": {**RUN, "seed": seed}})
        start("digits", config, root / "all" / name, Output(quiet=True))
    model = {"width": 16, "layers": 1, "heads": 1, "context": 16}
    config = from_json(
        lm, {"model": model, "text": [str(text)], "run": {**RUN, "fuse": 1, "keep_memory": False}}
    )
    start("lm", config, root / "all" / "text", Output(quiet=True))
    shutil.copytree(root / "all" / "one", root / "all" / "unfinished")
    (root / "all" / "unfinished" / "result.json").unlink()
    return root / "all"


@pytest.fixture
def call(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        return caught.value.code, *capsys.readouterr()

    return run


def test_eval_repeats_the_runs_last_evaluation(call, runs):
    code, out, err = call("eval", runs / "one")
    assert (code, err) == (0, "")
    lines = dict(line.split(" ") for line in out.splitlines())
    expected = read_result(runs / "one")["eval"]
    assert lines.pop("step") == "6"
    assert lines == {name: f"{value:.6g}" for name, value in expected.items()}


def test_eval_takes_an_older_step(call, runs):
    code, out, _ = call("eval", runs / "one", "--step", "3")
    assert code == 0 and out.startswith("step 3\n")
    assert out.splitlines()[1:] != call("eval", runs / "one")[1].splitlines()[1:]
    code, out, err = call("eval", runs / "one", "--step", "4")
    assert (code, out) == (1, "")
    assert "has no step 4; it has 3, 6" in err


def test_sample_continues_the_prompt(call, runs):
    arguments = ("sample", runs / "text", "--prompt", "the ", "--length", "5", "--seed", "3")
    code, out, err = call(*arguments)
    assert (code, err) == (0, "")
    assert out.startswith("the ") and 4 < len(out.rstrip("\n")) <= 4 + 5
    assert call(*arguments)[1] == out


def test_sample_shows_digits(call, runs):
    code, out, err = call("sample", runs / "one", "--length", "2")
    assert (code, err) == (0, "")
    assert len(re.findall(r"\d \(\d+%\), is \d", out)) == 2


def test_runs_lists_every_run_with_its_state(call, runs):
    code, out, err = call("runs", runs)
    assert (code, err) == (0, "")
    lines = {
        str(path): next(x for x in out.splitlines() if str(path) in x) for path in runs.iterdir()
    }
    for name in ("one", "two", "text"):
        line, result = lines[str(runs / name)], read_result(runs / name)
        assert "finished" in line and "6/6" in line
        assert f"loss {result['eval']['loss']:.4g}" in line
        assert result["params_sha256"][:12] in line
    assert "unfinished" in lines[str(runs / "unfinished")]


def test_runs_compares_what_differs_and_cuts_nothing(call, runs):
    code, out, err = call("runs", runs / "one", runs / "two")
    assert (code, err) == (0, "")
    cells = [[cell.strip() for cell in re.split("[│┃]", x)[1:-1]] for x in out.splitlines()]
    rows = {row[0]: row[1:] for row in cells if row}
    assert rows[""] == [str(runs / "one"), str(runs / "two")]
    assert rows["recipe"] == ["digits", "digits"]
    assert rows["run.seed"] == ["0", "1"]
    assert "run.steps" not in rows and "network" not in rows
    hashes = [read_result(runs / name)["params_sha256"] for name in ("one", "two")]
    assert rows["params_sha256"] == hashes
    for name in ("loss", "accuracy"):
        values = [read_result(runs / run)["eval"][name] for run in ("one", "two")]
        assert rows[f"held-out {name}"] == [f"{value:.6g}" for value in values]


def test_runs_of_one_run_shows_all_of_it(call, runs):
    code, out, _ = call("runs", runs / "one")
    assert code == 0
    assert re.search(r"run.steps +│ 6 ", out) and re.search(r"network +│ mlp ", out)


def test_runs_of_different_recipes_can_be_compared(call, runs):
    code, out, _ = call("runs", runs / "one", runs / "text")
    assert code == 0
    assert re.search(r"recipe +│ digits +│ lm ", out)
    assert re.search(r"model.width +│ - +│ 16 ", out)


def test_an_unreadable_run_does_not_hide_the_others(call, runs, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(runs / name, tmp_path / name)
    (tmp_path / "one" / "config.json").write_text("{")
    (tmp_path / "two" / "result.json").write_text('{"step": "x"}')
    (tmp_path / "[red]x[bold] :smile:").symlink_to(runs / "one")
    code, out, err = call("runs", tmp_path)
    assert (code, err) == (0, "")
    assert out.count("unreadable: ") == 2
    # A name is shown as it is, whatever the table's own markup would make of it.
    assert "[red]x[bold] :smile:" in out and "finished" in out


def test_runs_without_runs_says_how_to_get_some(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("runs")[::2] == (
        1,
        "fnml: there is no directory runs: 'fnml train' makes runs below runs/\n",
    )
    (tmp_path / "runs").mkdir()
    assert call("runs")[::2] == (
        1,
        "fnml: there are no runs below runs: 'fnml train' makes one\n",
    )


def test_a_run_needs_no_name_for_its_directory(call, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--network", "mlp", "--mlp.hidden", "8", "--steps", "2", "--batch-size", "16"]
    for _ in range(2):
        assert call("train", *options, "--quiet")[0] == 0
    made = sorted((tmp_path / "runs").iterdir())
    assert len(made) == 2 and all(path.name.startswith("digits-2") for path in made)
    assert call("runs")[1].count("finished") == 2


def test_doctor_shows_what_a_run_depends_on(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = call("doctor")
    assert (code, err) == (0, "")
    for name, value in (("fnml", fnml.__version__), ("jax", jax.__version__), ("backend", "cpu")):
        assert re.search(rf"│ {name} +│ {re.escape(value)}", out)
    assert re.search(r"free disk here +│ \d+\.\d GiB", out)
    for extra in ("bpe", "tensorboard", "prometheus", "notebooks"):
        assert f"extra {extra}" in out


def test_doctor_says_what_is_missing(call, monkeypatch):
    import importlib.util
    from importlib import metadata

    real = metadata.version

    def version(name):
        if name == "chex":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, _ = call("doctor")
    assert code == 1
    assert re.search(r"chex +│ missing +│ pip install chex", out)
    assert "pip install 'fnml[bpe]'" in out


# What a person might type or do to a file; every case has to end in a sentence, not a traceback.
WRONG = {
    "no run": ["eval"],
    "a run that is not there": ["eval", "nowhere"],
    "a file as a run": ["sample", "{runs}/one/config.json"],
    "a directory without a run": ["resume", "{runs}"],
    "two runs": ["eval", "{runs}/one", "{runs}/two"],
    "a finished run": ["resume", "{runs}/one"],
    "a step in words": ["eval", "{runs}/one", "--step", "last"],
    "a negative step": ["eval", "{runs}/one", "--step", "-1"],
    "nothing to draw": ["sample", "{runs}/text", "--length", "0"],
    "a negative seed": ["sample", "{runs}/one", "--seed", "-1"],
    "a huge seed": ["sample", "{runs}/text", "--seed", "9" * 30],
    "no temperature": ["sample", "{runs}/text", "--temperature", "nan"],
    "too many candidates": ["sample", "{runs}/text", "--top-k", "257"],
    "an unknown recipe": ["train", "digist"],
    "a recipe twice": ["train", "digits", "lm"],
    "an option without a value": ["train", "digits", "--steps"],
    "a number in words": ["train", "digits", "--steps", "many"],
    "a fraction of a step": ["train", "digits", "--steps", "1.5"],
    "no steps": ["train", "digits", "--steps", "0"],
    "more steps than int32 has": ["train", "digits", "--steps", "3000000000"],
    "an unknown network": ["train", "digits", "--network", "rnn"],
    "no classes": ["train", "digits", "--cnn.classes", "0"],
    "other classes": ["train", "digits", "--network", "mlp", "--mlp.outputs", "5"],
    "no stages": ["train", "digits", "--cnn.widths"],
    "a pool wider than the picture": ["train", "digits", "--cnn.pool", "9"],
    "a wrong dropout": ["train", "digits", "--mlp.dropout", "1.0"],
    "an infinite rate": ["train", "digits", "--network", "mlp", "--learning-rate", "inf"],
    "no rate": ["train", "digits", "--learning-rate", "nan"],
    "a glob that matches nothing": ["train", "digits", "--network", "mlp", "--decay", "none"],
    "batches of nothing": ["train", "digits", "--batch-size", "0"],
    "batches larger than memory": ["train", "digits", "--batch-size", "9" * 12],
    "a model larger than memory": ["train", "digits", "--network", "mlp", "--mlp.hidden", "9" * 13],
    "parts that do not divide": ["train", "digits", "--accumulate", "7"],
    "an unknown sink": ["train", "digits", "--network", "mlp", "--sinks", "jsnol"],
    "a sink twice": ["train", "digits", "--network", "mlp", "--sinks", "csv", "csv"],
    "a wrong port": ["train", "digits", "--prometheus-port", "-1"],
    "a run's directory": ["train", "digits", "--network", "mlp", "--out", "{runs}/one"],
    "a directory in use": ["train", "digits", "--network", "mlp", "--out", "{runs}"],
    "a file as a directory": ["train", "digits", "--network", "mlp", "--out", "{text}"],
    "a file as a parent": ["train", "digits", "--network", "mlp", "--out", "{text}/run"],
    "a name too long": ["train", "digits", "--network", "mlp", "--out", "x" * 300],
    "a text that is not there": ["train", "lm", "--text", "nowhere"],
    "a text that is a directory": ["train", "lm", "--text", "{runs}"],
    "a text that is too short": ["train", "lm", "--text", "{runs}/one/config.json"],
    "heads that do not divide": ["train", "lm", "--heads", "3"],
    "another vocabulary": ["train", "lm", "--vocab", "300"],
    "no vocabulary": ["train", "lm", "--tokens", "bpe", "--text", "{text}"],
    "a vocabulary too large": [
        *["train", "lm", "--tokens", "bpe", "--vocab", "99999", "--text", "{text}"]
    ],
    "a run to compare with nothing": ["runs", "{runs}/one", "nowhere"],
    "a listing of a file": ["runs", "{text}"],
    "words for doctor": ["doctor", "please"],
    "words for plugins": ["plugins", "--all"],
}


@pytest.mark.parametrize("case", WRONG)
def test_no_wrong_input_gives_a_traceback(call, runs, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    names = {"runs": runs, "text": runs.parent / "text"}
    code, out, err = call(*(word.format(**names) for word in WRONG[case]))
    assert code in (1, 2)
    assert err.strip() or (code == 2 and out.strip())
    assert "Traceback" not in out + err
    # How much memory there is shows only when it is taken, by a run that has begun.
    if "larger than memory" not in case:
        assert list(tmp_path.iterdir()) == [], "something was left behind"


@pytest.mark.parametrize("command", ["eval", "sample", "resume", "runs"])
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", '{"format": 1, "recipe": "gone", "config": {}, "output": {}}'),
        ("config.json", '{"format": 1, "recipe": "digits", "config": {"run": 3}, "output": {}}'),
        ("config.json", '{"format": 2}'),
        ("result.json", '{"eval": 3}'),
        ("result.json", "\0"),
    ],
)
def test_no_damaged_record_gives_a_traceback(call, runs, tmp_path, command, file, content):
    directory = shutil.copytree(runs / "one", tmp_path / "one")
    (directory / file).write_text(content)
    code, out, err = call(command, directory)
    touched = file == "config.json" or command in ("resume", "runs")
    # Listing needs neither the recipe nor a configuration that fits.
    shown = command == "runs" and ("gone" in content or '"run": 3' in content)
    assert code == (1 if touched and not shown else 0)
    assert ("fnml: " in err) == (code == 1)
    assert "Traceback" not in out + err
    code, out, _ = call("runs", tmp_path)
    assert code == 0


def test_a_run_without_checkpoints_is_named(call, runs, tmp_path):
    directory = shutil.copytree(runs / "one", tmp_path / "one")
    shutil.rmtree(directory / "checkpoints")
    for command in ("eval", "sample"):
        code, out, err = call(command, directory)
        assert (code, out) == (1, "")
        assert "holds no saved step" in err


def test_a_run_of_another_shape_lists_the_arrays(call, runs, tmp_path):
    directory = shutil.copytree(runs / "one", tmp_path / "one")
    record = json.loads((directory / "config.json").read_text())
    record["config"]["mlp"]["hidden"] = [9]
    (directory / "config.json").write_text(json.dumps(record))
    code, _, err = call("eval", directory)
    assert code == 1
    assert "does not fit the target" in err and "params/hidden/0/kernel" in err
