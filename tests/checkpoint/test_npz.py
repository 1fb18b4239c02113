import io
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import abstract, assert_same_bits

from fnml.checkpoint import load_npz, save_npz
from fnml.core import CheckpointError, ShapeError

PARAMS = {
    "layers": [{"kernel": jnp.arange(6.0).reshape(2, 3).T}, {"kernel": jnp.ones((0, 2))}],
    "half": jnp.array([1.5, jnp.nan, -0.0], jnp.float16),
    "scalar": jnp.float32(2),
    "flags": jnp.array([True, False]),
    "file": jnp.arange(3, dtype=jnp.uint8),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.npz"


def test_parameters_come_back_bit_by_bit(path):
    save_npz(path, PARAMS)
    assert_same_bits(load_npz(path, PARAMS), PARAMS)
    assert_same_bits(load_npz(path, abstract(PARAMS)), PARAMS)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_equal_parameters_give_equal_files(path):
    save_npz(path, PARAMS)
    first = path.read_bytes()
    save_npz(path, PARAMS)
    assert path.read_bytes() == first


def test_numpy_reads_what_is_written(path):
    save_npz(path, PARAMS)
    with np.load(path, allow_pickle=False) as stored:
        assert set(stored) == {
            "layers/0/kernel", "layers/1/kernel", "half", "scalar", "flags", "file"
        }  # fmt: skip
        np.testing.assert_array_equal(stored["layers/0/kernel"], PARAMS["layers"][0]["kernel"])
        assert stored["scalar"].shape == ()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read(path, save):
    arrays = {
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
        "empty": np.zeros((3, 0), np.float16),
        "scalar": np.array(7, np.int64),
        "zeros": np.zeros(300_000),
    }
    save(path, **arrays)
    loaded = load_npz(path)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(loaded[name], array)


def test_what_numpy_has_no_dtype_for_is_listed(path):
    bad = {"k": jax.random.key(0), "h": jnp.zeros(2, jnp.bfloat16)}
    with pytest.raises(ShapeError, match=r"(?s)h: bfloat16.*k: key<fry>"):
        save_npz(path, {**bad, "fine": jnp.zeros(2)})
    assert not path.exists()


def test_mismatches_are_listed(path):
    save_npz(path, {"a": jnp.zeros(2), "b": jnp.zeros(2)})
    with pytest.raises(CheckpointError, match=r"(?s)a: has shape.*b: has dtype.*c: expected"):
        load_npz(path, {"a": jnp.zeros(3), "b": jnp.zeros(2, jnp.int32), "c": jnp.zeros(1)})


def test_pickles_are_refused_and_not_run(path, tmp_path):
    victim = tmp_path / "victim"

    class Payload:
        def __reduce__(self):
            return (open, (str(victim), "w"))

    np.savez(path, a=np.array([Payload()], dtype=object))
    with pytest.raises(CheckpointError, match="dtype object, which is no number"):
        load_npz(path)
    assert not victim.exists()


def test_damage_is_a_named_error(path):
    save_npz(path, PARAMS)
    whole = path.read_bytes()
    inside = whole.index(np.arange(3, dtype=np.uint8).tobytes())
    flipped = bytearray(whole)
    flipped[inside] ^= 1
    for data in (b"", b"PK", whole[:-10], whole[:200], bytes(flipped)):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_npz(path)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_npz(path.parent / "no" / "model.npz", PARAMS)


def npy(shape, body=b""):
    header = repr({"descr": "<f8", "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return np.lib.format.magic(1, 0) + (118).to_bytes(2, "little") + header.encode() + body


@pytest.mark.parametrize("shape", [(2**40,), (2**62, 2**62), (-1,), (2**70,), (0, 2**62)])
def test_a_header_cannot_ask_for_memory(path, shape):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", npy(shape))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_npz(path)


def test_a_zip_bomb_is_refused_before_it_unpacks(path):
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", npy((12 * 2**20,), bytes(96 * 2**20)))
    assert len(bomb.getvalue()) < 2**20
    path.write_bytes(bomb.getvalue())
    with pytest.raises(CheckpointError, match="would unpack to"):
        load_npz(path)
