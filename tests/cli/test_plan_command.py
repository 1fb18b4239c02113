"""``fnml plan``: what it prints, and its exit code."""

import pytest

from fnml.cli import main

# A GPT of one thin layer.
TINY = ("--layers", "1", "--width", "64", "--heads", "8", "--mlp-width", "64", "--context", "32")


def plan(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main(["--no-cache", "plan", *arguments, "--no-cache"])
    captured = capsys.readouterr()
    return exit.value.code, captured.out, captured.err


def test_a_plan_that_fits(capsys):
    code, out, _ = plan(
        *(capsys, "gpt-1b", "--target", "cpu:4", "--batch-size", "8", *TINY, "--vocab", "64"),
        *("--mesh", "data=2,model=2", "--rules", "fsdp+tensor", "--show", "--no-changes"),
    )
    assert code == 0
    assert "cpu:4: 4 chips, data=2, model=2" in out
    assert "fits" in out
    assert "(model)" in out
    assert "layers/mlp/up" in out


def test_a_misfit_says_by_how_much_and_what_would_help(capsys):
    # A table of 2**33 tokens: 2 TiB a copy, which no change makes smaller than this machine.
    code, out, _ = plan(
        *(capsys, "gpt-1b", "--target", "cpu:2", "--batch-size", "8", *TINY),
        *("--vocab", str(2**31 - 1), "--mesh", "data=2", "--rules", "fsdp"),
    )
    assert code == 1
    assert "it does not fit:" in out
    assert "too much" in out
    assert "--remat off" in out
    assert "--accumulate 4" in out
    assert "none of these changes makes it fit" in out


def test_the_largest_batch(capsys):
    code, out, _ = plan(
        *(capsys, "digits", "--target", "cpu", "--network", "mlp", "--mlp.hidden", "16"),
        *("--largest-batch", "--batch-size", "4096"),
    )
    assert code == 0
    assert "the largest batch found to fit is" in out


def test_the_cheapest_mesh(capsys):
    code, out, _ = plan(
        *(capsys, "digits", "--target", "cpu:4", "--network", "mlp", "--mlp.hidden", "16"),
        "--cheapest-mesh",
    )
    assert code == 0
    assert out.splitlines()[-1].startswith("--target cpu:1 --mesh data=1")


def test_wrong_options_are_refused(capsys):
    code, _, error = plan(capsys, "digits", "--target", "v5e:16")
    assert code == 1
    assert "v5e:4x4" in error
    code, _, error = plan(capsys, "gpt-9b")
    assert code == 1
    assert "gpt-9b" in error


def test_help_names_recipes_and_chips(capsys):
    code, out, _ = plan(capsys, "--help")
    assert code == 0
    assert "gpt-70b" in out
    assert "h200" in out
