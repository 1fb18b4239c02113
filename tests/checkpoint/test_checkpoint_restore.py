import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import abstract, adamw_state, assert_same_bits

from fnml.checkpoint import Checkpointer, restore, restore_meta
from fnml.core import CheckpointError


def save(directory, steps, state=None):
    with Checkpointer(directory, keep_last=9) as checkpointer:
        for step in steps:
            checkpointer.save(step, state or {"w": jnp.int32(step)}, {"at": step})


def flip(path, byte=0, bit=0):
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def largest(step):
    return max(
        (p for p in (step / "arrays").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )


def mesh_of(devices):
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ("d",), axis_types=auto, devices=jax.devices()[:devices])


@pytest.mark.parametrize("source", [1, 8])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_restores_exactly_onto_other_meshes(tmp_path, source, devices):
    host = {
        "rows": np.arange(64 * 6, dtype=np.float32).reshape(64, 6),
        "half": jnp.arange(16, dtype=jnp.bfloat16),
        "columns": np.arange(3 * 8, dtype=np.int32).reshape(3, 8),
        "whole": np.arange(5, dtype=np.float32),
        "keys": jax.random.split(jax.random.key(1), 8),
    }
    specs = {
        "rows": jax.P("d"),
        "half": jax.P("d"),
        "columns": jax.P(None, "d"),
        "whole": jax.P(),
        "keys": jax.P("d"),
    }

    def shardings(count):
        mesh = mesh_of(count)
        return {name: jax.NamedSharding(mesh, spec) for name, spec in specs.items()}

    save(tmp_path, [1], jax.device_put(host, shardings(source)))
    targets = {
        name: jax.ShapeDtypeStruct(host[name].shape, host[name].dtype, sharding=sharding)
        for name, sharding in shardings(devices).items()
    }
    for target in (targets, jax.device_put(host, shardings(devices))):
        restored = restore(tmp_path, target).state
        for name, sharding in shardings(devices).items():
            assert restored[name].sharding == sharding, name
            assert restored[name].committed, name
        assert_same_bits(restored, jax.tree.map(jnp.asarray, host))


def test_the_newest_whole_step_is_chosen(tmp_path):
    save(tmp_path, [1, 2, 3, 4])
    flip(largest(tmp_path / "00000004"))
    (tmp_path / "00000003" / "manifest.json").unlink()
    said = []
    restored = restore(tmp_path, {"w": jnp.int32(0)}, on_skip=said.append)
    assert (restored.step, int(restored.state["w"]), restored.meta) == (2, 2, {"at": 2})
    assert len(said) == 2
    assert "step 4 is damaged" in said[0]
    assert largest(tmp_path / "00000004").name in said[0]
    assert "has sha256" in said[0]
    assert "step 3 is damaged: manifest.json is missing" in said[1]


def test_a_requested_step_is_that_step_or_an_error(tmp_path):
    save(tmp_path, [1, 2, 3])
    assert restore(tmp_path, {"w": jnp.int32(0)}, step=2).meta == {"at": 2}
    flip(largest(tmp_path / "00000002"))
    with pytest.raises(CheckpointError, match=r"step 2 is damaged.*sha256.*other steps: 1, 3"):
        restore(tmp_path, {"w": jnp.int32(0)}, step=2)
    with pytest.raises(CheckpointError, match="has no step 7; it has 1, 2, 3"):
        restore(tmp_path, {"w": jnp.int32(0)}, step=7)


def test_when_no_step_is_whole_all_are_listed(tmp_path):
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="holds no saved step"):
            restore(directory, {})
    save(tmp_path, [1, 2])
    for step in ("00000001", "00000002"):
        (tmp_path / step / "meta.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        restore(tmp_path, {"w": jnp.int32(0)}, on_skip=lambda _: None)
    assert "step 1 is damaged: meta.json is missing" in str(caught.value)
    assert "step 2 is damaged: meta.json is missing" in str(caught.value)


def test_every_mismatch_with_the_target_is_listed_and_nothing_is_cast(tmp_path):
    saved = {
        "same": jnp.zeros(2),
        "shape": jnp.zeros((2, 3)),
        "dtype": jnp.zeros(2, jnp.bfloat16),
        "extra": jnp.zeros(2),
        "kernel": jnp.zeros(2),
        "key": jax.random.key(0),
        "raw": jax.random.key_data(jax.random.key(0)),
    }
    save(tmp_path, [1], saved)
    target = {
        "same": jnp.zeros(2),
        "shape": jnp.zeros((3, 2)),
        "dtype": jnp.zeros(2, jnp.float32),
        "kernal": jnp.zeros(2),
        "key": jax.random.key(0, impl="rbg"),
        "raw": jax.random.key(0),
    }
    with pytest.raises(CheckpointError) as caught:
        restore(tmp_path, target)
    assert str(caught.value).splitlines()[1:] == [
        "  dtype: has dtype bfloat16 in the file, expected float32 (nothing is cast silently)",
        "  extra: in the file, but not expected",
        "  kernal: expected, but not in the file. Did you mean 'kernel'?",
        "  kernel: in the file, but not expected",
        "  key: has dtype key<fry> in the file, expected key<rbg> (nothing is cast silently)",
        "  raw: has shape (2,) in the file, expected ()",
        "  raw: has dtype uint32 in the file, expected key<fry> (nothing is cast silently)",
        "  shape: has shape (2, 3) in the file, expected (3, 2)",
    ]


def test_a_wide_dtype_is_not_narrowed(tmp_path):
    save(tmp_path, [1], {"w": np.array([1e300])})
    with pytest.raises(CheckpointError, match="w: dtype float64 needs jax_enable_x64"):
        restore(tmp_path, {"w": jax.ShapeDtypeStruct((1,), np.dtype("float64"))})
    with jax.enable_x64(True):
        wide = restore(tmp_path, {"w": jax.ShapeDtypeStruct((1,), np.dtype("float64"))})
        assert wide.state["w"].dtype == np.float64
        assert float(wide.state["w"][0]) == 1e300


def test_a_sharding_that_does_not_fit_is_an_error_of_its_own(tmp_path):
    save(tmp_path, [1], {"w": jnp.zeros(6)})
    sharding = jax.NamedSharding(mesh_of(4), jax.P("d"))
    with pytest.raises(CheckpointError, match="is whole, but cannot be restored onto the target"):
        restore(tmp_path, {"w": jax.ShapeDtypeStruct((6,), jnp.float32, sharding=sharding)})


def test_the_structure_is_the_targets(tmp_path):
    state = adamw_state(model_state={"mean": jnp.ones(3)})
    save(tmp_path, [1], state)
    assert_same_bits(restore(tmp_path, abstract(state)).state, state)


def test_meta_alone_can_be_read(tmp_path):
    save(tmp_path, [1, 2])
    assert restore_meta(tmp_path) == {"at": 2}
    assert restore_meta(tmp_path, 1) == {"at": 1}
    flip(tmp_path / "00000002" / "meta.json", 3)
    assert restore_meta(tmp_path) == {"at": 1}
    with pytest.raises(CheckpointError, match=r"step 2 is damaged: meta.json has sha256"):
        restore_meta(tmp_path, 2)
    with pytest.raises(CheckpointError, match="no step 3"):
        restore_meta(tmp_path, 3)


def test_a_plain_orbax_reader_understands_the_arrays(tmp_path):
    import orbax.checkpoint as ocp

    save(tmp_path, [1], {"a": {"b": jnp.arange(3)}})
    with ocp.PyTreeCheckpointer() as checkpointer:
        arrays = checkpointer.restore(
            tmp_path / "00000001" / "arrays",
            restore_args={"a/b": ocp.RestoreArgs(restore_type=np.ndarray)},
        )
    np.testing.assert_array_equal(arrays["a/b"], [0, 1, 2])
