"""``fnml laws``: what is right passes, what is wrong is named, and so is what to define."""

import re
import sys

import pytest
from user_losses import DRAWING, GOOD, HEAD, IMPURE, NAIVE

from fnml.cli import main


@pytest.fixture
def laws(tmp_path, monkeypatch, capsys):
    """Write a module where the user stands, check it; return the exit code and the output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(name, source, *arguments):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(SystemExit) as stopped:
            main(["laws", f"{name}:loss_fn", *arguments])
        out = capsys.readouterr()
        # A table in a pipe: the law is in the first column, its status in the second.
        rows = re.findall(r"^[│|] (\w+) +[│|] ([a-z ]*?) +[│|]", out.out, re.MULTILINE)
        return stopped.value.code, dict(rows), out.out + out.err

    return run


def test_a_good_loss_passes(laws):
    code, found, text = laws("good_loss", GOOD)
    assert code == 0, text
    assert set(found.values()) == {"held"}
    assert list(found) == [
        *("purity", "compilation", "evaluation", "weight", "accumulate", "remat", "fuse"),
        *("data_parallel", "pmap"),
    ]


def test_a_mean_over_unmasked_examples_weighted_by_all_is_found(laws):
    code, found, text = laws("naive_loss", NAIVE)
    assert code == 1
    assert {name for name, status in found.items() if status == "broken"} == {
        "weight",
        "accumulate",
    }
    assert "2 of 9 broken: weight, accumulate" in text
    assert "the weight is not what the loss was divided by" in text


def test_a_counter_in_the_loss_is_found(laws):
    code, found, text = laws("impure_loss", IMPURE)
    assert code == 1 and found["purity"] == "broken"
    assert "outside its arguments" in text


def test_a_loss_that_cannot_do_without_its_key_is_told_so_and_checked_shard_by_shard(laws):
    code, found, text = laws("drawing_loss", DRAWING)
    assert code == 1
    assert {name for name, status in found.items() if status == "broken"} == {"evaluation"}
    assert found["weight"] == "not applicable" and found["accumulate"] == "held"
    assert "eval_step calls it without a key" in text


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        (GOOD.replace("def example", "def exampel"), [], "return params, batch"),
        (GOOD.replace("def example", "def exampel"), [], "Did you mean 'exampel'?"),
        (GOOD, ["--example", "small"], "has no function 'small'"),
        (GOOD.replace("return params, batch", "return params"), [], r"example\(\) returns dict"),
        (HEAD, [], "has no function 'loss_fn'"),
        (GOOD.replace("return error.value, ", "return "), [], "has to return .loss, fnml.Metrics"),
        (GOOD.replace('batch["x"]', 'batch["y"]'), [], "fails on the example: KeyError: 'y'"),
    ],
)
def test_what_is_missing_is_said(laws, source, arguments, message):
    code, _, text = laws("incomplete_loss", source, *arguments)
    assert code == 1 and re.search(message, text), text


def test_a_module_that_is_not_there_and_a_reference_that_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for reference, message in (
        ("not_there:loss_fn", "there is no module 'not_there'"),
        ("not_there", "expected MODULE:FUNCTION"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["laws", reference])
        assert stopped.value.code == 1 and message in capsys.readouterr().err
