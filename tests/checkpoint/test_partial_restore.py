"""Restore a part of a checkpoint, under other names, or all of it without a target."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import abstract, adamw_state, assert_same_bits, raw

from fnml.checkpoint import Checkpointer, restore, tree_sha256
from fnml.core import CheckpointError, ConfigError, leaf_names

STATE = adamw_state(seed=3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("partial")
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(4, STATE, {"at": 4})
    return directory


def test_without_a_target_all_arrays_come_by_path(saved):
    found = restore(saved)
    assert (found.step, found.meta) == (4, {"at": 4})
    assert sorted(found.state) == sorted(leaf_names(STATE))
    for name, leaf in zip(leaf_names(STATE), jax.tree.leaves(STATE), strict=True):
        assert isinstance(found.state[name], np.ndarray)
        assert found.state[name].tobytes() == raw(leaf).tobytes(), name
    scale = restore(saved, only="params/scale").state
    assert list(scale) == ["params/scale"] and scale["params/scale"] == 1.5


def test_only_what_matches_is_restored_and_the_rest_is_kept(saved):
    other = adamw_state(seed=9)
    found = restore(saved, other, only=("params/dense/**", "step")).state
    assert_same_bits(found.params["dense"], STATE.params["dense"])
    assert int(found.step) == 3
    assert_same_bits(found.params["half"], other.params["half"])
    assert_same_bits(found.opt_state, other.opt_state)


def test_parameters_alone_into_a_tree_of_their_own(saved):
    target = abstract(STATE.params)
    found = restore(saved, target, only="**", rename={"params/**": "**"}).state
    assert_same_bits(found, STATE.params)


def test_renamed_by_rules(saved):
    params = STATE.params
    target = {"body": {"kernel": params["dense"]["kernel"], "bias": params["dense"]["bias"]}}
    rules = {"params/dense/*": "body/*"}
    assert_same_bits(restore(saved, target, only="**", rename=rules).state["body"], params["dense"])
    swapped = {"body": {"kernel": params["dense"]["bias"], "bias": params["dense"]["kernel"]}}
    crossed = {"params/dense/kernel": "body/bias", "params/dense/bias": "body/kernel"}
    found = restore(saved, swapped, only="**", rename=crossed).state
    assert_same_bits(found["body"]["bias"], params["dense"]["kernel"])


def test_the_first_rule_that_matches_decides(saved):
    rules = {"params/dense/bias": "b", "params/**": "p/**"}
    names = set(restore(saved, rename=rules).state)
    assert {"b", "p/dense/kernel", "p/half/0", "p/scale", "step"} <= names
    assert "p/dense/bias" not in names


def test_every_fault_of_a_partial_restore_is_listed(saved):
    target = {"params": {"scale": jnp.zeros(2), "extra": jnp.zeros(2)}, "step": jnp.float32(0)}
    target["kept"] = jax.ShapeDtypeStruct((3,), jnp.float32)
    with pytest.raises(CheckpointError) as caught:
        restore(saved, target, only=("params/**", "step"))
    assert str(caught.value).splitlines()[1:] == [
        "  params/extra: expected, but not in the file.",
        "  params/scale: has shape () in the file, expected (2,)",
        "  step: has dtype int32 in the file, expected float32 (nothing is cast silently)",
        "  kept: is kept from the target, which only describes it; give an array there",
    ]


def test_rules_that_do_nothing_or_too_much_are_refused(saved):
    with pytest.raises(ConfigError, match=r"'parms/\*\*' matches no path in the file"):
        restore(saved, rename={"parms/**": "p/**"})
    with pytest.raises(ConfigError, match=r"nothing on the left stands for \['\*'\]"):
        restore(saved, rename={"params/scale": "p/*"})
    with pytest.raises(
        ConfigError, match="params/dense/bias and params/dense/kernel would both be"
    ):
        restore(saved, rename={"params/dense/*": "one"})
    with pytest.raises(ConfigError, match="the glob 'parms' matches none"):
        restore(saved, STATE, only="parms")


def test_a_damaged_file_is_found_even_if_its_part_is_not_wanted(saved, tmp_path):
    copy = shutil.copytree(saved, tmp_path / "copy")
    files = [path for path in (copy / "00000004" / "arrays").rglob("*") if path.is_file()]
    file = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="has sha256"):
        restore(copy, only="step")


def test_hashes_agree_with_and_without_a_target(saved):
    typed = restore(saved, abstract(STATE)).state
    found = restore(saved, only="params/**").state
    params = {name.removeprefix("params/"): x for name, x in found.items()}
    assert tree_sha256(params) == tree_sha256(typed.params)
