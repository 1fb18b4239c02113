"""Two runs that part: the step, the arrays and the examples are found."""

import dataclasses
import json
import shutil

import jax
import pytest
from run_processes import QUIET, TEXT, digits, fnml

from fnml.checkpoint import Checkpointer
from fnml.recipes import diff, replay, resume, start
from fnml.recipes._replay import Replayer

RUN = {"keep_last": 9, "log_every": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, and others that differ from it in one thing each."""
    root = tmp_path_factory.mktemp("diff")
    variants = {
        "a": {},
        "again": {},
        "seed": {"run": {"seed": 1}},
        "rate": {"optimizer": {"learning_rate": 1e-3}},
        "shift": {"shift": 0},
    }
    for name, fields in variants.items():
        run = {**RUN, **fields.pop("run", {})}
        start("digits", digits(**fields, run=run), root / name, QUIET)
    return root


def test_equal_runs_are_the_same(runs, capsys):
    found = diff(runs / "a", runs / "again")
    assert found.same and not found.config
    assert fnml("diff", runs / "a", runs / "again") == 0
    assert "the same" in capsys.readouterr().out


def test_another_seed_parts_them_before_the_first_step(runs):
    found = diff(runs / "a", runs / "seed")
    assert found.step == 0
    assert [line.split(":")[0] for line in found.config] == ["config/run/seed"]
    assert "key" in found.parameters


def test_another_rate_parts_them_in_the_update(runs):
    found = diff(runs / "a", runs / "rate")
    assert found.step == 1
    assert found.examples == []
    assert "look at the optimizer" in found.remarks[0]
    assert all(name.startswith("params/") for name in found.parameters)
    assert found.config[0].startswith("config/optimizer/learning_rate: 0.003 in")
    assert found.row is not None and found.row.startswith("train row of step 4: loss")


def test_another_loss_parts_them_at_an_example(runs, capsys):
    found = diff(runs / "a", runs / "shift")
    assert found.step == 1
    first = Replayer(runs / "a").examples(1)[0]
    assert found.examples[0].startswith(f"example 0 of the batch, number {first}: loss ")
    assert "the same state and examples give other losses" in found.remarks
    assert fnml("diff", runs / "a", runs / "shift") == 1
    out = capsys.readouterr().out
    assert "they part at step 1" in out and "config/shift: 1 in" in out


def test_other_examples_are_named(tmp_path):
    """Two texts that differ in one letter, which some windows of the second step hold."""
    options = ["--width", "16", "--layers", "1", "--heads", "2", "--context", "16", "--steps", "4"]
    options += ["--batch-size", "64", "--no-keep-memory", "--warmup", "0", "--quiet"]
    text = bytearray(TEXT.read_bytes())
    (tmp_path / "text").write_bytes(text)
    assert fnml("train", "lm", *options, "--text", tmp_path / "text", "--out", tmp_path / "a") == 0
    numbers = [set(Replayer(tmp_path / "a").examples(step).tolist()) for step in (1, 2)]
    window = next(n for n in sorted(numbers[1]) if not numbers[0] & {n - 1, n, n + 1})
    text[window * 8 + 10] ^= 1
    (tmp_path / "other").write_bytes(text)
    copy = shutil.copytree(tmp_path / "a", tmp_path / "b")
    record = json.loads((copy / "config.json").read_text())
    record["config"]["text"] = [str(tmp_path / "other")]
    (copy / "config.json").write_text(json.dumps(record))
    shutil.rmtree(copy / "checkpoints")
    (copy / "result.json").unlink()
    (copy / "metrics.jsonl").unlink()
    resume(copy, QUIET)
    found = diff(tmp_path / "a", copy)
    assert found.step == 2
    order = Replayer(tmp_path / "a").examples(2).tolist()
    touched = [
        f"example {i} of the batch: number {n}, with other content"
        for i, n in enumerate(order)
        if n in (window - 1, window)
    ]
    assert found.examples == touched
    assert found.remarks == ["the same state learns from other examples"]


def test_a_fault_that_does_not_come_again_is_laid_at_the_right_door(runs, tmp_path):
    """A bit flips in memory at step 10 of one run: everything after is another run's."""
    odd = shutil.copytree(runs / "a", tmp_path / "odd")
    (odd / "result.json").unlink()
    shutil.rmtree(odd / "checkpoints" / "00000012")
    found = replay(runs / "a", 11)
    leaves, structure = jax.tree.flatten(found.state.params)
    params = jax.tree.unflatten(structure, [leaves[0].at[0].add(1e-3), *leaves[1:]])
    meta = json.loads((odd / "checkpoints" / "00000010" / "meta.json").read_text())
    with Checkpointer(odd / "checkpoints", keep_last=9) as keeper:
        keeper.save(10, dataclasses.replace(found.state, params=params), meta)
    resume(odd, QUIET)
    parted = diff(runs / "a", odd)
    assert parted.step is None and not parted.same
    assert parted.remarks[0] == "computed again, steps 6 to 10 are the same in both"
    assert len(parted.remarks) == 2
    assert parted.remarks[1].startswith(f"{odd} does not come to its own checkpoint of step 10")
