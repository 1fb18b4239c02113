import logging
import os
import resource
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import abstract, adamw_state, assert_same_bits, raw

from fnml.checkpoint import Checkpointer, restore, restore_meta, verify
from fnml.core import CheckpointError, ConfigError, ShapeError


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_a_training_state_comes_back_bit_by_bit(tmp_path, impl):
    state = adamw_state(impl=impl)
    meta = {"position": 2**53 + 1, "rate": 0.1, "names": ["ä", None, True], "deep": {"x": []}}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, state, meta)
    for target in (state, abstract(state)):
        step, restored, got = restore(tmp_path, target)
        assert step == 3
        assert got == meta
        assert_same_bits(restored, state)
        assert jax.random.key_impl(restored.key) == impl
        # Committed arrays could not be mixed with those of a mesh.
        assert not any(leaf.committed for leaf in jax.tree.leaves(restored))
        # The key has to draw the same numbers, not only look the same.
        draws = [jax.random.normal(k, (4,)) for k in (restored.key, state.key)]
        assert raw(draws[0]).tobytes() == raw(draws[1]).tobytes()


def test_odd_trees_come_back(tmp_path):
    floats = ["float8_e4m3fn", "float8_e5m2", "bfloat16", "float16"]
    state = {
        **{name: jnp.arange(6, dtype=jnp.float32).astype(name) for name in floats},
        "int4": jnp.arange(-4, 4, dtype=jnp.int8).astype("int4"),
        "bool": jnp.array([True, False]),
        "complex": jnp.array([1 + 2j], jnp.complex64),
        "special": jnp.array([np.nan, -np.inf, -0.0, 1e-45], jnp.float32),
        "empty": jnp.zeros((0, 3), jnp.bfloat16),
        "keys": jax.random.split(jax.random.key(5), (2, 3)),
        "no keys": jax.random.split(jax.random.key(5), 3)[:0],
        "none": None,
        "tuple": ((), [jnp.uint8(7)]),
        "a.b/c": jnp.int32(1),
        "..": jnp.int32(2),
        "ü\n": jnp.int32(3),
        3: jnp.int32(4),
        "transposed": jnp.arange(6).reshape(2, 3).T,
        "numpy": np.arange(3, dtype=np.float64),
    }
    state = {str(k): v for k, v in state.items()}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state, {})
    restored = restore(tmp_path, state).state
    assert_same_bits(restored, state)
    assert isinstance(restored["numpy"], np.ndarray)


@pytest.mark.parametrize("state", [(), {"a": None}, jnp.float32(2), {"e": jnp.zeros((0,))}])
def test_states_with_next_to_nothing(tmp_path, state):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {"x": 1})
    assert verify(tmp_path) == {1: []}
    assert_same_bits(restore(tmp_path, state).state, state)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_state_may_be_donated_at_once(tmp_path, devices):
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("d"))
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 7, s), donate_argnums=0)
    state = {str(i): jnp.arange(2**18, dtype=jnp.float32) + i for i in range(4)}
    state = jax.device_put(state, sharding)
    want = {name: np.array(x) for name, x in state.items()}
    with Checkpointer(tmp_path) as checkpointer:
        for step in range(3):  # the later saves copy into reused memory
            old = state
            checkpointer.save(step, state, {})
            state = overwrite(state)
            jax.block_until_ready(state)
            assert old["0"].is_deleted()
            assert_same_bits(
                {k: np.array(v) for k, v in state.items()},
                jax.tree.map(lambda x: np.full_like(x, -7), want),
            )
            checkpointer.wait()
            assert_same_bits(restore(tmp_path, want).state, want)
            want = {name: np.array(x) for name, x in state.items()}


def test_the_copy_shares_no_memory_with_the_device(tmp_path):
    from fnml.checkpoint._tree import to_host

    state = {"w": jnp.arange(2**16, dtype=jnp.float32), "n": np.arange(3)}
    host = to_host(state, {})
    assert not np.shares_memory(host["w"], np.asarray(state["w"]))
    assert not np.shares_memory(host["n"], state["n"])
    again = to_host(jax.tree.map(lambda x: x + 1, state), host)
    assert np.shares_memory(again["w"], host["w"])
    np.testing.assert_array_equal(again["w"], np.arange(2**16) + 1)
    other = to_host({"w": jnp.zeros(3)}, again)
    assert other["w"].shape == (3,)


def test_restored_arrays_can_be_donated(tmp_path):
    state = {"w": jnp.arange(2**16, dtype=jnp.float32)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state, {})
    restored = restore(tmp_path, abstract(state)).state
    assert not restored["w"].committed
    after = jax.jit(lambda s: {"w": s["w"] + 1}, donate_argnums=0)(restored)
    np.testing.assert_array_equal(after["w"], np.arange(2**16) + 1)


def save_all(checkpointer, steps):
    for step, metric in steps:
        checkpointer.save(step, {"w": jnp.float32(step)}, {}, metric=metric)
    checkpointer.wait()


def test_the_last_and_the_best_are_kept(tmp_path):
    nan, inf = float("nan"), float("inf")
    metrics = [(1, 0.5), (2, nan), (3, 0.2), (4, -inf), (5, 0.2), (6, None), (7, 0.9)]
    with Checkpointer(tmp_path / "min", keep_last=2, keep_best=2) as checkpointer:
        save_all(checkpointer, metrics)
        assert checkpointer.steps() == [3, 5, 6, 7]
        assert (checkpointer.best(), checkpointer.latest()) == (3, 7)
    with Checkpointer(tmp_path / "max", keep_last=1, keep_best=1, best="max") as checkpointer:
        save_all(checkpointer, metrics[:-1])
        assert checkpointer.steps() == [1, 6]
        assert checkpointer.best() == 1
    with Checkpointer(tmp_path / "none", keep_last=1, keep_best=3) as checkpointer:
        assert (checkpointer.steps(), checkpointer.best(), checkpointer.latest()) == (
            [],
            None,
            None,
        )
        save_all(checkpointer, [(1, nan), (2, inf), (3, None)])
        assert checkpointer.steps() == [3]
        assert checkpointer.best() is None
    assert sorted(p.name for p in (tmp_path / "min").iterdir()) == [
        "00000003", "00000005", "00000006", "00000007"]  # fmt: skip


def test_retention_survives_a_restart_and_a_rewind(tmp_path):
    with Checkpointer(tmp_path, keep_last=2, keep_best=1) as checkpointer:
        save_all(checkpointer, [(10, 0.1), (20, 0.3), (30, 0.2)])
        assert checkpointer.steps() == [10, 20, 30]
    with Checkpointer(tmp_path, keep_last=2, keep_best=1) as checkpointer:
        save_all(checkpointer, [(15, 0.9)])
        assert checkpointer.steps() == [10, 15, 20, 30], "the step just saved must stay"
        save_all(checkpointer, [(40, 0.4)])
        assert checkpointer.steps() == [10, 30, 40]


def test_steps_that_cannot_be_judged_are_left_alone(tmp_path):
    with Checkpointer(tmp_path, keep_last=1, keep_best=0) as checkpointer:
        save_all(checkpointer, [(1, 0.1)])
        (tmp_path / "00000001" / "manifest.json").write_text("{}")
        save_all(checkpointer, [(2, 0.1), (3, 0.1)])
        assert checkpointer.steps() == [1, 3]


def test_a_step_can_be_saved_again(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        for take in (1, 2):
            checkpointer.save(5, {"w": jnp.int32(take)}, {"take": take})
    restored = restore(tmp_path, {"w": jnp.int32(0)})
    assert (int(restored.state["w"]), restored.meta) == (2, {"take": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["00000005"]


def test_a_background_error_surfaces_once_and_spares_older_steps(tmp_path):
    good, bad = {"w": jnp.arange(4)}, {"w": jnp.arange(4).astype("uint4")}  # Orbax has no uint4
    for surface in ("save", "check", "wait", "close"):
        directory = tmp_path / surface
        checkpointer = Checkpointer(directory)
        checkpointer.save(1, good, {})
        checkpointer.save(2, bad, {})
        if surface == "check":
            checkpointer._thread.join()
        surfaces = {
            "save": lambda c=checkpointer: c.save(3, good, {}),
            "check": checkpointer.check,
            "wait": checkpointer.wait,
            "close": checkpointer.close,
        }
        with pytest.raises(CheckpointError, match=r"step 2 was not saved.*uint4") as caught:
            surfaces[surface]()
        assert caught.value.__cause__ is not None
        if surface != "close":
            checkpointer.check()
            checkpointer.save(4, good, {})
        checkpointer.close()
        assert verify(directory) == {key: [] for key in ([1] if surface == "close" else [1, 4])}
        assert all(not p.name.startswith(".") for p in directory.iterdir())
        assert_same_bits(restore(directory, good).state, good)


def test_a_file_that_cannot_grow_is_reported_and_the_next_save_works(tmp_path):
    small, large = {"w": jnp.zeros(8)}, {"w": jnp.zeros(2**20)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, small, {})
        checkpointer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
        try:
            with pytest.raises(CheckpointError, match="step 2 was not saved"):
                checkpointer.save(2, large, {})
                checkpointer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert checkpointer.steps() == [1]
        checkpointer.save(3, large, {})
    assert verify(tmp_path) == {1: [], 3: []}


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 4 MiB and 48 files, if this process may mount one."""
    options = ["-t", "tmpfs", "-o", "size=4m,nr_inodes=48", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no right to mount a tmpfs: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_is_refused_before_anything_is_written(tiny_disk):
    with Checkpointer(tiny_disk / "run", keep_last=9) as checkpointer:
        checkpointer.save(1, {"w": jnp.ones(2**18)}, {})
        checkpointer.wait()
        with pytest.raises(CheckpointError) as caught:
            checkpointer.save(2, {"w": jnp.ones(2**20)}, {})
        assert "step 2 was not saved" in str(caught.value)
        assert "needs 4,2" in str(caught.value)  # 4 MiB and the overhead
        assert "are free" in str(caught.value)
        assert [p.name for p in (tiny_disk / "run").iterdir()] == ["00000001"]
        checkpointer.save(3, {"w": jnp.ones(4)}, {})
    assert verify(tiny_disk / "run") == {1: [], 3: []}


def test_a_disk_that_fills_up_while_writing_spares_older_steps(tiny_disk):
    """Bytes are left, but no more files: only the write itself can notice."""
    state = {"w": jnp.arange(4)}
    checkpointer = Checkpointer(tiny_disk / "run", keep_last=99)
    with pytest.raises(CheckpointError, match=r"was not saved.*No space left.*bytes and .* free"):
        for step in range(10):
            checkpointer.save(step, state, {})
    checkpointer.close()
    steps = checkpointer.steps()
    assert 1 <= len(steps) < 9
    assert verify(tiny_disk / "run") == {key: [] for key in steps}
    assert_same_bits(restore(tiny_disk / "run", state).state, state)


def test_an_error_in_the_block_is_not_hidden_by_a_lost_save(tmp_path):
    with pytest.raises(KeyError) as caught, Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": jnp.zeros(2).astype("uint4")}, {})
        raise KeyError("the user's own")
    assert any("step 1 was not saved" in note for note in caught.value.__notes__)


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"keep_last is 0.*keep_best is -1.*best is 'least'"):
        Checkpointer(tmp_path, keep_last=0, keep_best=-1, best="least")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot hold checkpoints"):
        Checkpointer(tmp_path / "file")
    with Checkpointer(tmp_path / "run") as checkpointer:
        with pytest.raises(ConfigError, match="step is -1"):
            checkpointer.save(-1, {}, {})
        meta = {"a": [1, float("nan")], "b": {3: 1}, "c": np.float32(1)}
        with pytest.raises(ConfigError) as caught:
            checkpointer.save(1, {}, meta)
        for part in ("meta/a/1: nan", "meta/b: the key 3", "meta/c: float32"):
            assert part in str(caught.value)
        with pytest.raises(ShapeError) as shape:
            checkpointer.save(1, {"x": 1.0, "a/b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}}, {})
        assert "x: float is no array" in str(shape.value)
        assert "a/b: 2 leaves share this path" in str(shape.value)
        assert checkpointer.steps() == []
    checkpointer.close()
    with pytest.raises(CheckpointError, match="closed"):
        checkpointer.save(1, {}, {})


def test_leftovers_of_the_dead_are_cleaned_and_of_the_living_are_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with Checkpointer(tmp_path) as checkpointer:
        save_all(checkpointer, [(1, None), (2, None)])
    # A process died between setting step 2 aside and putting the new one in its place ...
    (tmp_path / "00000002").rename(tmp_path / f".old-2-{dead.pid}")
    assert int(restore(tmp_path, {"w": jnp.float32(0)}).state["w"]) == 2
    # ... and others at other instants.
    names = [f".tmp-3-{dead.pid}", f".tmp-4-{os.getpid()}", f".tmp-5-{os.getppid()}", ".git"]
    for name in [*names, f".old-1-{dead.pid}"]:
        (tmp_path / name / "arrays").mkdir(parents=True)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [1, 2]
    assert {p.name for p in tmp_path.iterdir()} == {"00000001", "00000002", *names[2:]}
    assert verify(tmp_path) == {1: [], 2: []}


def test_only_one_save_is_in_flight_and_the_wait_is_counted(tmp_path):
    state = {"w": jnp.ones(2**18)}
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.blocked == 0
        for step in range(4):
            checkpointer.save(step, state, {})
            writers = [t for t in threading.enumerate() if t.name.startswith("fnml-checkpoint")]
            assert len(writers) <= 1
        assert checkpointer.blocked > 0
    assert restore_meta(tmp_path) == {}


def test_orbax_is_imported_only_when_needed_and_stays_quiet(tmp_path):
    code = f"""
import logging, sys
import jax.numpy as jnp
from fnml.checkpoint import Checkpointer, restore
loaded = lambda: any(name.startswith("orbax") for name in sys.modules)
assert not loaded()
before = (logging.root.level, list(logging.root.handlers), logging.getLogger("absl").level)
with Checkpointer({str(tmp_path)!r}) as checkpointer:
    checkpointer.save(1, {{"w": jnp.ones(3)}}, {{}})
    checkpointer.save(2, {{"w": jnp.ones(3)}}, {{}})
restore({str(tmp_path)!r}, {{"w": jnp.ones(3)}})
assert loaded()
assert before[0] == logging.root.level
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_skips_go_to_the_log_by_default(tmp_path, caplog):
    with Checkpointer(tmp_path) as checkpointer:
        save_all(checkpointer, [(1, None), (2, None)])
    (tmp_path / "00000002" / "meta.json").unlink()
    with caplog.at_level(logging.WARNING, "fnml.checkpoint"):
        assert restore(tmp_path, {"w": jnp.float32(0)}).step == 1
    assert "step 2 is damaged: meta.json is missing" in caplog.text
