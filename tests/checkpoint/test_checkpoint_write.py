import json
import threading
from hashlib import sha256

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import assert_same_bits

from fnml.checkpoint import Checkpointer, _arrays, _write, restore, verify
from fnml.core import CheckpointError


def test_saves_in_quick_succession_keep_each_its_own_bits(tmp_path):
    """The write reads the reused host memory itself: the next save must not touch it before."""

    def state(seed):
        words = np.random.default_rng(seed).integers(0, 2**32, 2**21, np.uint32)
        half = words.view(np.uint16).view(jnp.bfloat16)
        bits = np.array([0x80000000, 0x7FC12345, 0xFF812345 + seed], np.uint32).view(np.float32)
        return {
            "float32": words.view(np.float32),
            "bfloat16": half,
            "special": bits,
            "int64": words.view(np.int64),
            "key": jnp.asarray(words[:2]),
            "empty": words[:0],
            "scalar": words[0].reshape(()),
        }

    states = [state(seed) for seed in range(4)]
    with Checkpointer(tmp_path, keep_last=len(states)) as checkpointer:
        for step, each in enumerate(states):
            checkpointer.save(step, each, {})
    assert verify(tmp_path) == {step: [] for step in range(len(states))}
    for step, each in enumerate(states):
        assert_same_bits(restore(tmp_path, each, step=step).state, each)


def test_large_arrays_are_not_cut_and_many_data_files_are_sealed_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(_arrays, "_DATA_FILE", 2**16)
    state = {f"w{i:02}": np.full((2**13,), i, np.float32) for i in range(24)}
    state["large"] = np.arange(2**17 + 1, dtype=np.float32)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state, {})
    root = tmp_path / "00000000"
    files = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    manifest = json.loads(files.pop("manifest.json"))["files"]
    assert sum(len(data) >= 2**15 for data in files.values()) >= 2
    assert {name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()} == {
        name: (len(data), sha256(data).hexdigest()) for name, data in files.items()
    }
    whole = state["large"].tobytes()
    assert any(whole in data for data in files.values())
    assert_same_bits(restore(tmp_path, state).state, state)


def test_a_file_that_cannot_be_hashed_fails_the_save(tmp_path, monkeypatch):
    state = {"w": jnp.arange(4)}
    hashed, threads = _write.file_sha256, set()

    def broken(path):
        threads.add(threading.current_thread().name)
        if path.name == "meta.json":
            raise OSError("Input/output error")
        return hashed(path)

    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        checkpointer.wait()
        with monkeypatch.context() as patch:
            patch.setattr(_write, "file_sha256", broken)
            checkpointer.save(2, state, {})
            with pytest.raises(CheckpointError, match=r"step 2 was not saved.*Input/output error"):
                checkpointer.wait()
        assert threads
        assert all(name.startswith("fnml-seal") for name in threads)
        assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
        checkpointer.save(3, state, {})
    assert verify(tmp_path) == {1: [], 3: []}
