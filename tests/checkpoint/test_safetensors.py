import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_states import abstract, assert_same_bits

from fnml.checkpoint import load_safetensors, save_safetensors
from fnml.core import CheckpointError, ShapeError

PARAMS = {
    "layers": [{"kernel": jnp.arange(6.0).reshape(2, 3).T}, {"kernel": jnp.ones((0, 2))}],
    "half": jnp.array([1.5, jnp.nan, -0.0], jnp.bfloat16),
    "scalar": jnp.float32(2),
    "flags": jnp.array([True, False]),
    "bytes": jnp.arange(3, dtype=jnp.uint8),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def test_parameters_come_back_bit_by_bit(path):
    save_safetensors(path, PARAMS, {"format": "pt"})
    assert_same_bits(load_safetensors(path, PARAMS), PARAMS)
    assert_same_bits(load_safetensors(path, abstract(PARAMS)), PARAMS)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_flat_form_has_paths_and_keeps_wide_dtypes(path):
    save_safetensors(path, {"a": [np.array([2**40])], "b": np.array(1e300)})
    flat = load_safetensors(path)
    assert flat["a/0"].dtype == np.int64
    assert int(flat["a/0"][0]) == 2**40
    assert float(flat["b"]) == 1e300


def test_the_file_follows_the_published_format(path):
    """Read with nothing but the format's description: a length, a JSON header, bytes."""
    save_safetensors(path, {"w": jnp.array([1.0, 2.0])}, {"by": "fnml"})
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert header["__metadata__"] == {"by": "fnml"}
    assert (header["w"]["dtype"], header["w"]["shape"]) == ("F32", [2])
    start, stop = header["w"]["data_offsets"]
    body = data[8 + length :][start:stop]
    np.testing.assert_array_equal(np.frombuffer(body, "<f4"), [1.0, 2.0])


def test_the_safetensors_library_reads_what_is_written(path):
    save_safetensors(path, PARAMS, {"format": "np"})
    stored = safetensors.numpy.load_file(path)
    assert stored.keys() == load_safetensors(path).keys()
    for name, array in load_safetensors(path).items():
        assert (stored[name].shape, stored[name].dtype) == (array.shape, array.dtype)
        assert stored[name].tobytes() == array.tobytes()


def test_what_the_safetensors_library_writes_is_read(path):
    arrays = {
        "big": np.arange(3, dtype=">i4"),
        "odd": np.arange(3, dtype=np.int8),
        "wide": np.arange(4.0),
        "empty": np.zeros((0, 3), np.float16),
        "scalar": np.array(2.5, np.float32),
        "complex": np.array([1 + 2j], np.complex64),
    }
    safetensors.numpy.save_file(arrays, path, metadata={"by": "safetensors"})
    loaded = load_safetensors(path)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (loaded[name].shape, loaded[name].dtype.name) == (array.shape, array.dtype.name)
        np.testing.assert_array_equal(loaded[name], array)


def test_arrays_are_views_of_the_file_until_they_are_on_a_device(path):
    save_safetensors(path, {"w": np.zeros(1 << 16, np.float32)})
    loaded = load_safetensors(path)["w"]
    placed = jax.block_until_ready(load_safetensors(path, {"w": jnp.zeros(1 << 16)})["w"])
    with path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(np.float32(7).tobytes())
    assert loaded[-1] == 7
    assert placed[-1] == 0
    with pytest.raises(ValueError, match="read-only"):
        loaded[0] = 1


def test_odd_memory_is_written_as_the_numbers_it_holds(path):
    swapped = np.arange(4, dtype=">f8")
    save_safetensors(path, {"swapped": swapped, "strided": np.arange(9).reshape(3, 3)[::2, 1:].T})
    loaded = load_safetensors(path)
    assert loaded["swapped"].dtype == np.float64
    np.testing.assert_array_equal(loaded["swapped"], swapped)
    np.testing.assert_array_equal(loaded["strided"], [[1, 7], [2, 8]])


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "no JSON object": [],
    "texts": {"__metadata__": {"a": 1}},
    "is described by": {"w": {"dtype": "F32"}},
    "has dtype 'F8_E5M2'": {"w": entry("F8_E5M2")},
    r"has shape \[-1\]": {"w": entry(shape=(-1,))},
    r"has shape \[1.0\]": {"w": entry(shape=(1.0,))},
    "has 4 bytes, and shape": {"w": entry(shape=(2,))},
    "has -4 bytes": {"w": entry(offsets=(4, 0))},
    "hole or overlap": {"w": entry(), "v": entry()},
    "hole or overlap at byte 0": {"w": entry(offsets=(1, 5))},
    "take 8 bytes, and 4 follow": {"w": entry(shape=(2,), offsets=(0, 8))},
    "take 0 bytes, and 4 follow": {},
}


@pytest.mark.parametrize("expected", HEADERS)
def test_a_header_that_lies_is_refused(path, expected):
    header = json.dumps(HEADERS[expected]).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError, match=expected):
        load_safetensors(path)


def test_one_name_twice_is_refused(path):
    one = json.dumps(entry())
    header = f'{{"w": {one}, "w": {one}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError, match="one name twice"):
        load_safetensors(path)


def test_a_target_with_a_sharding_is_filled_on_it(path):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("d"))
    save_safetensors(path, {"w": jax.device_put(jnp.arange(16.0), sharding)})
    target = {"w": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding)}
    loaded = load_safetensors(path, target)["w"]
    assert loaded.sharding == sharding
    np.testing.assert_array_equal(loaded, np.arange(16.0))


def test_all_mismatches_are_listed(path):
    save_safetensors(path, {"a": jnp.zeros(2), "b": jnp.zeros(2), "c": jnp.zeros(2)})
    with pytest.raises(CheckpointError) as caught:
        load_safetensors(path, {"a": jnp.zeros(3), "b": jnp.zeros(2, jnp.bfloat16), "d": PARAMS})
    for part in ("a: has shape (2,)", "b: has dtype float32", "c: in the file", "d/half: expected"):
        assert part in str(caught.value)


def test_a_wide_dtype_is_not_narrowed(path):
    save_safetensors(path, {"w": np.array([1e300])})
    with pytest.raises(CheckpointError, match="w: dtype float64 needs jax_enable_x64"):
        load_safetensors(path, {"w": jax.ShapeDtypeStruct((1,), np.dtype("float64"))})


def test_what_the_format_cannot_hold_is_listed(path):
    bad = {"k": jax.random.key(0), "i": jnp.zeros(2, "int4"), "f": jnp.zeros(2, "float8_e5m2")}
    with pytest.raises(ShapeError) as caught:
        save_safetensors(path, {**bad, "fine": jnp.zeros(2)})
    assert str(caught.value).splitlines()[1:] == [
        "  f: float8_e5m2",
        "  i: int4",
        "  k: key<fry>",
    ]
    assert not path.exists()


def test_damaged_and_missing_files_are_errors_and_an_old_file_is_kept(path, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_safetensors(path)
    save_safetensors(path, PARAMS)
    whole = path.read_bytes()
    for data in (b"", whole[:-1], whole + b"x", b"\xff" * 64, struct.pack("<Q", 2**60) + whole[8:]):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_safetensors(path)
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_safetensors(tmp_path / "no" / "model.safetensors", PARAMS)
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_safetensors(tmp_path / "folder", PARAMS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", path.name]
    assert_same_bits(load_safetensors(path, PARAMS), PARAMS)
