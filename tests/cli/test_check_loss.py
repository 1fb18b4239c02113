"""``fnml check loss``: each planted fault is found and named, and a sound loss passes."""

import re
import sys

import jax
import pytest
from faulty_losses import FAULTS, SOUND

from fnml.cli import main
from fnml.core import ConfigError
from fnml.laws import check_loss


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(name, source, *arguments):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
        # As JAX is by default: that [B] meets [B, 1] in silence is one of the faults.
        with jax.numpy_rank_promotion("allow"), pytest.raises(SystemExit) as stopped:
            main(["check", "loss", f"{name}:loss_fn", *arguments])
        out = capsys.readouterr()
        return stopped.value.code, out.out + out.err

    return run


def test_a_sound_loss_passes(check):
    code, text = check("sound_loss", SOUND)
    assert code == 0 and "broken" not in text, text


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named(check, fault):
    source, law, says = FAULTS[fault]
    code, text = check(fault, source)
    assert code == 1, text
    # The table breaks a cell's lines; its borders are no part of what is said.
    broken = re.search(r"(\d+) of \d+ broken: (.*)", text)
    assert broken and law in broken[2].split(", "), text
    plain = re.sub(r"[│┃|]", " ", text)
    assert re.search(says, plain), text


def test_what_is_meant_can_be_allowed(check):
    source, law, _ = FAULTS["unused_batch_field"]
    code, text = check("allowed_fault", source, "--allow", law)
    assert code == 0 and "allowed" in text, text


def test_an_unknown_allowance_is_refused():
    with pytest.raises(ConfigError, match="Did you mean 'broadcast'"):
        check_loss(None, None, None, allow=("brodcast",))
