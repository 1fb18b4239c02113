"""Damage a saved step in every way, and see that nothing of it goes unnoticed."""

import hashlib
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import adamw_state, assert_same_bits

from fnml.checkpoint import Checkpointer, Fault, restore, verify
from fnml.core import CheckpointError

STATE = adamw_state(seed=4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(12, STATE, {"position": 3}, metric=0.5)
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def files_of(directory):
    return sorted(p for p in directory.rglob("*") if p.is_file())


def problems(directory):
    (faults,) = verify(directory).values()
    return [(fault.file, fault.problem) for fault in faults]


def refused(directory, words):
    with pytest.raises(CheckpointError) as caught:
        restore(directory, STATE, on_skip=lambda _: None)
    assert words in str(caught.value)


def seal(directory, body):
    """Write a manifest as an attacker would: changed, but with a correct hash of its own."""
    body.pop("sha256", None)
    text = (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()
    body["sha256"] = hashlib.sha256(text).hexdigest()
    text = (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()
    (directory / "00000012" / "manifest.json").write_bytes(text)


def manifest_of(directory):
    return json.loads((directory / "00000012" / "manifest.json").read_text())


def test_an_unharmed_step_has_no_faults(saved):
    assert verify(saved) == {12: []}
    assert verify(saved / "00000012") == {12: []}
    assert_same_bits(restore(saved, STATE).state, STATE)


def test_no_flipped_bit_is_silent(copy):
    files = files_of(copy)
    names = {path.name for path in files}
    assert {"manifest.json", "meta.json", "_METADATA", "manifest.ocdbt"} <= names
    rng = np.random.default_rng(0)
    for trial in range(160):
        path = files[trial % len(files)]
        whole = path.read_bytes()
        broken = bytearray(whole)
        broken[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        assert [file for file, _ in problems(copy)] == [
            path.relative_to(copy / "00000012").as_posix()
        ]
        refused(copy, path.name)
        path.write_bytes(whole)
    # The control: everything was put back, so what was refused was the flip.
    assert verify(copy) == {12: []}
    assert_same_bits(restore(copy, STATE).state, STATE)


def test_every_bit_of_a_manifest_counts(copy):
    """All the bits of a span that holds hashes, numbers, punctuation and white space."""
    path = copy / "00000012" / "manifest.json"
    whole = path.read_bytes()
    span = [*range(120), *range(len(whole) - 120, len(whole))]
    for byte in span:
        for bit in range(8):
            broken = bytearray(whole)
            broken[byte] ^= 1 << bit
            path.write_bytes(broken)
            assert [file for file, _ in problems(copy)] == ["manifest.json"], (byte, bit)


def test_missing_truncated_and_grown_files_are_named(copy):
    for path in files_of(copy):
        name = path.relative_to(copy / "00000012").as_posix()
        whole = path.read_bytes()
        path.unlink()
        assert problems(copy) == [(name, "is missing")]
        refused(copy, f"{name} is missing")
        path.write_bytes(whole[:-1])
        assert [file for file, _ in problems(copy)] == [name]
        path.write_bytes(b"")
        assert [file for file, _ in problems(copy)] == [name]
        path.write_bytes(whole + b"\n")
        assert [file for file, _ in problems(copy)] == [name]
        path.write_bytes(whole)
    assert problems(copy) == []


def test_sizes_are_given(copy):
    (copy / "00000012" / "meta.json").write_text("{}")
    assert problems(copy) == [("meta.json", "has 2 bytes, expected 19")]


def test_extra_files_and_links_are_reported(copy):
    step = copy / "00000012"
    (step / "arrays" / "stray").write_text("x")
    (step / "link").symlink_to(copy)
    assert problems(copy) == [
        ("arrays/stray", "is not listed in the manifest"),
        ("link", "is not listed in the manifest"),
    ]
    refused(copy, "arrays/stray")


def test_a_link_in_the_place_of_a_file_or_folder_is_refused(copy, tmp_path):
    step = copy / "00000012"
    (step / "meta.json").rename(tmp_path / "elsewhere")
    (step / "meta.json").symlink_to(tmp_path / "elsewhere")
    assert problems(copy) == [("meta.json", "is no regular file")]
    (step / "meta.json").unlink()
    (tmp_path / "elsewhere").rename(step / "meta.json")
    (step / "arrays").rename(tmp_path / "arrays")
    (step / "arrays").symlink_to(tmp_path / "arrays")
    assert ("arrays/_METADATA", "is missing") in problems(copy)
    refused(copy, "is missing")


def test_a_pipe_is_refused_without_waiting_for_a_writer(copy):
    for name in ("meta.json", "manifest.json"):
        path = copy / "00000012" / name
        whole = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        assert problems(copy) == [(name, "is no regular file")]
        path.unlink()
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/hostname", "arrays/../../secret", "a//b", "./meta.json", "", "a\\b"]
)
def test_paths_that_leave_the_step_are_refused(copy, path):
    secret = b"secret"
    (copy / "secret").write_bytes(secret)
    body = manifest_of(copy)
    body["files"][path] = {"size": len(secret), "sha256": hashlib.sha256(secret).hexdigest()}
    seal(copy, body)
    ((file, problem),) = problems(copy)
    assert file == "manifest.json"
    assert f"lists {path!r}, which is no path inside" in problem
    refused(copy, "no path inside")


def drop(body, *keys):
    for key in keys:
        del body[key]
    return body


FORGERIES = {
    "another format": (lambda b: {**b, "format": "x"}, "is no fnml-checkpoint manifest"),
    "a newer version": (lambda b: {**b, "version": 2}, "has version 2, this fnml reads 1"),
    "another step": (lambda b: {**b, "step": 13}, "belongs to step 13, not 12"),
    "a negative step": (lambda b: {**b, "step": -1}, "has the step -1"),
    "a step that is no number": (lambda b: {**b, "step": True}, "has the step True"),
    "a metric that is no number": (lambda b: {**b, "metric": "0"}, "has the metric '0'"),
    "no files": (lambda b: drop(b, "files"), "no creation time, no files or no tree"),
    "a tree that is a list": (lambda b: {**b, "tree": []}, "no files or no tree"),
    "no meta": (lambda b: drop(b["files"], "meta.json") and b, "is not listed"),
    "a negative size": (
        lambda b: b["files"]["meta.json"].update(size=-1) or b,
        "describes the file 'meta.json'",
    ),
    "a huge shape": (
        lambda b: b["tree"]["step"].update(shape=[2**70]) or b,
        "describes the array 'step'",
    ),
    "a dtype that is no text": (
        lambda b: b["tree"]["step"].update(dtype=3) or b,
        "describes the array 'step'",
    ),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_forged_manifests_are_refused_by_name(copy, case):
    forge, words = FORGERIES[case]
    seal(copy, forge(manifest_of(copy)))
    assert words in "; ".join(problem for _, problem in problems(copy))
    refused(copy, words)


def test_an_honest_seal_is_accepted(copy):
    """The forger's tool itself works: an unchanged body that it seals passes."""
    seal(copy, manifest_of(copy))
    assert problems(copy) == []


def test_a_forged_tree_or_generator_does_not_pass_as_the_target(copy):
    body = manifest_of(copy)
    body["tree"]["key"]["impl"] = "no such generator"
    seal(copy, body)
    refused(copy, "cannot be restored onto the target")
    body["tree"]["key"]["impl"] = "rbg"
    seal(copy, body)
    with pytest.raises(CheckpointError):
        restore(copy, STATE)


def test_deep_and_wrong_json_is_refused(copy):
    manifest = copy / "00000012" / "manifest.json"
    for text in ("[" * 100_000, '{"a": ' * 100_000, "\xff", "", "null", "[]", '{"a": 1e999}'):
        manifest.write_bytes(text.encode("latin-1"))
        assert [file for file, _ in problems(copy)] == ["manifest.json"]
    with manifest.open("wb") as file:
        file.truncate(65 * 2**20)
    assert "too many" in problems(copy)[0][1]


def test_arrays_that_differ_from_the_manifest_are_caught(copy, tmp_path):
    """A correct manifest over other arrays: the types are checked once more after reading."""
    other = jax.tree.map(
        lambda x: x if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.reshape(-1)[:1],
        STATE,
    )
    with Checkpointer(tmp_path / "other") as checkpointer:
        checkpointer.save(12, other, {"position": 3})
    body = manifest_of(tmp_path / "other")
    body["tree"] = manifest_of(copy)["tree"]
    seal(tmp_path / "other", body)
    assert problems(tmp_path / "other") == []
    refused(tmp_path / "other", "holds other arrays than its manifest says")


def test_what_is_not_a_step_is_not_one(copy, tmp_path):
    for name in ("12", "000000012", "0000001x", "-0000012", "notes"):
        (copy / name).mkdir()
    (copy / "00000013").write_text("a file")
    (copy / "00000014").symlink_to(copy / "00000012")
    assert list(verify(copy)) == [12]
    with pytest.raises(CheckpointError, match="no such directory"):
        verify(tmp_path / "nowhere")


def test_a_fault_reads_as_a_sentence():
    assert str(Fault(3, "meta.json", "is missing")) == "step 3: meta.json is missing"


def test_large_step_numbers_keep_their_order(tmp_path):
    with Checkpointer(tmp_path, keep_last=9) as checkpointer:
        for step in (99_999_999, 100_000_000, 7):
            checkpointer.save(step, {"w": jnp.int32(step)}, {})
    assert list(verify(tmp_path)) == [7, 99_999_999, 100_000_000]
    assert restore(tmp_path, {"w": jnp.int32(0)}).step == 100_000_000
