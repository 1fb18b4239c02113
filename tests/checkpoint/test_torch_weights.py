import importlib.util
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import abstract, assert_same_bits

from fnml.checkpoint import load_torch, save_torch
from fnml.core import CheckpointError, ShapeError

PARAMS = {
    "layers": [{"weight": jnp.arange(6.0).reshape(2, 3).T}, {"weight": jnp.ones((0, 2))}],
    "half": jnp.array([1.5, jnp.nan, -0.0], jnp.bfloat16),
    "scalar": jnp.float32(2),
    "flags": jnp.array([True, False]),
    "many": np.arange(300, dtype=np.int64),
}
# An interpreter that has PyTorch; it need not have fnml.
TORCH = os.environ.get(
    "FNML_TORCH_PYTHON", sys.executable if importlib.util.find_spec("torch") else ""
)
needs_torch = pytest.mark.skipif(not TORCH, reason="PyTorch is not installed")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


def archive_of(path, data, records=(), **extra):
    """Write the records of a ``.pt`` file by hand."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", data)
        for key, body in enumerate(records):
            archive.writestr(f"m/data/{key}", body)
        for name, body in extra.items():
            archive.writestr(f"m/{name}", body)


class Call:
    """Pickles as a call of a global by name, with any arguments."""

    def __init__(self, name, *arguments):
        self.name, self.arguments = name, arguments


class Name(str):
    """Pickles as a global."""


class Persistent(tuple):
    """Pickles as a persistent identity."""


def opcodes(value):
    """Pickle dicts, tuples, numbers and texts together with the above, by the format's rules."""
    if isinstance(value, Name):
        return "c{}\n{}\n".format(*value.rsplit(".", 1)).encode()
    if isinstance(value, Call):
        return opcodes(Name(value.name)) + opcodes(value.arguments) + b"R"
    if isinstance(value, Persistent):
        return opcodes(tuple(value)) + b"Q"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(opcodes, value)) + b"t"
    if isinstance(value, dict):
        return b"}(" + b"".join(opcodes(k) + opcodes(v) for k, v in value.items()) + b"u"
    return pickle.dumps(value, 2)[2:-1]


def pickled(value):
    return b"\x80\x02" + opcodes(value) + b"."


def storage(count, kind="torch.FloatStorage", key="0"):
    return Persistent(("storage", Name(kind), key, "cpu", count))


def tensor(storage, offset, shape, strides):
    hooks = Call("collections.OrderedDict")
    return Call("torch._utils._rebuild_tensor_v2", storage, offset, shape, strides, False, hooks)


def test_parameters_come_back_bit_by_bit(path):
    save_torch(path, PARAMS)
    assert_same_bits(load_torch(path, PARAMS), PARAMS)
    described = {**PARAMS, "layers": abstract(PARAMS["layers"])}
    assert_same_bits(load_torch(path, described), PARAMS)
    assert set(load_torch(path)) == {
        "layers.0.weight", "layers.1.weight", "half", "scalar", "flags", "many"
    }  # fmt: skip
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_records_are_aligned_so_that_they_can_be_mapped(path):
    save_torch(path, PARAMS)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            local = whole[info.header_offset :]
            name, extra = struct.unpack("<HH", local[26:30])
            assert (info.header_offset + 30 + name + extra) % 64 == 0


def test_views_of_one_storage(path):
    view = tensor(storage(6), 1, (2, 2), (3, 1))
    turned = tensor(storage(6), 0, (3, 2), (1, 3))
    archive_of(
        path,
        pickled({"model": {"view": view, "turned": turned}, "epoch": 3}),
        [np.arange(6, dtype="<f4").tobytes()],
    )
    loaded = load_torch(path)
    assert loaded.keys() == {"model/view", "model/turned"}
    np.testing.assert_array_equal(loaded["model/view"], [[1, 2], [4, 5]])
    np.testing.assert_array_equal(loaded["model/turned"], np.arange(6).reshape(2, 3).T)
    with pytest.raises(ValueError, match="read-only"):
        loaded["model/view"][0, 0] = 1


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("place", ["whole", "value", "key"])
def test_a_malicious_pickle_is_refused_by_name_and_not_run(path, tmp_path, protocol, place):
    victim = tmp_path / "victim"

    class Payload:
        def __reduce__(self):
            return (os.system, (f"touch {victim}",))

        def __hash__(self):
            return 0

    payload = {"whole": Payload(), "value": {"w": Payload()}, "key": {Payload(): 1}}[place]
    data = pickle.dumps(payload, protocol)
    archive_of(path, data)
    with pytest.raises(CheckpointError) as caught:
        load_torch(path)
    assert f"{os.system.__module__}.system" in str(caught.value) or "no state dict needs" in str(
        caught.value
    )
    assert not victim.exists()
    # The payload is live: the check above could fail.
    pickle.loads(data)
    assert victim.exists()


W = tensor(storage(2), 0, (2,), (1,))
REFUSED = {
    "asks for 'posix.system'": {"w": Name("posix.system")},
    "builtins.eval": Call("builtins.eval", "1"),
    "torch.load": Call("torch.load", "x"),
    "calls torch.FloatStorage": Call("torch.FloatStorage", 3),
    "reaches element 2": {"w": tensor(storage(2), 1, (2,), (1,))},
    "reaches element 9": {"w": tensor(storage(2), 0, (2, 2), (8, 1))},
    "expanded": {"w": tensor(storage(2), 0, (2**40,), (0,))},
    "has a tensor of": {"w": tensor(storage(2), 0, (2,), (-1,))},
    "which are not 3": {"w": tensor(storage(3), 0, (2,), (1,))},
    "is missing": {"w": tensor(storage(2, key="../../0"), 0, (2,), (1,))},
    "two of its tensors": {"a": {"b": W}, "a/b": W},
    "neither texts nor integers": {(1, 2): W},
    "names the storage": {"w": tensor(Persistent(("file", 1, "0", "cpu", 2)), 0, (2,), (1,))},
}


@pytest.mark.parametrize("expected", REFUSED)
def test_what_is_no_state_dict_is_refused(path, expected):
    archive_of(path, pickled(REFUSED[expected]), [bytes(8)])
    with pytest.raises(CheckpointError) as caught:
        load_torch(path)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02.",
        b"\x80\x02t.",
        b"\x80\x02((.",
        b"\x80\x02h\x07.",
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x02}q\x00(X\x01\x00\x00\x00ah\x00u.",
        b"\x80\x02" + b"]" + b"\x85" * 100_000 + b".",
        b"\x80\x02" + b"](" * 50_000 + b"e" * 50_000 + b".",
        b"\x80\x02r\xff\xff\xff\x7f.",
        b"\x80\x02J\x01\x00\x00\x00r\xff\xff\xff\x7f.",
        b"\x80\x04\x8d" + b"\xff" * 8,
    ],
)
def test_an_odd_pickle_ends_in_a_named_error_or_holds_nothing(path, data):
    archive_of(path, data)
    try:
        assert load_torch(path) == {}
    except CheckpointError as error:
        assert "cannot be read" in str(error)


def test_one_container_in_many_places_is_refused(path):
    doubled = b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(64))
    laughs = b"\x80\x02](K\x01eq\x00" + doubled + b"."
    archive_of(path, laughs)
    with pytest.raises(CheckpointError, match="in two places"):
        load_torch(path)


def test_damage_and_other_formats_are_named(path):
    save_torch(path, PARAMS)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(np.arange(300, dtype="<i8").tobytes()) + 9] ^= 1
    for data in (b"", whole[:-10], whole[:200], bytes(flipped)):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_torch(path)
    path.write_bytes(pickle.dumps({"w": 1}, 2))
    with pytest.raises(CheckpointError, match=r"before version 1\.6"):
        load_torch(path)
    archive_of(path, pickled({"w": W}), [bytes(8)], byteorder="big")
    with pytest.raises(CheckpointError, match="big-endian"):
        load_torch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "y")
    with pytest.raises(CheckpointError, match=r"0 files data\.pkl"):
        load_torch(path)


def test_what_the_format_cannot_hold_is_listed(path):
    bad = {"k": jax.random.key(0), "u": np.zeros(2, np.uint32)}
    with pytest.raises(ShapeError, match=r"(?s)k: key<fry>.*u: uint32"):
        save_torch(path, {**bad, "fine": jnp.zeros(2)})
    with pytest.raises(ShapeError, match=r"would both be 'a\.b'"):
        save_torch(path, {"a.b": jnp.zeros(2), "a": {"b": jnp.zeros(2)}})
    assert not path.exists()


def in_torch(script, *arguments):
    done = subprocess.run(
        [TORCH, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_torch
def test_torch_reads_what_is_written(path):
    save_torch(path, PARAMS)
    for mapped in ("", "mmap"):
        read = in_torch(
            "import json, sys, torch\n"
            "d = torch.load(sys.argv[1], weights_only=True, mmap=bool(sys.argv[2]))\n"
            "print(json.dumps({k: [str(v.dtype), list(v.shape), v.reshape(-1).view(torch.uint8)"
            ".tolist()] for k, v in d.items()}))",
            path,
            mapped,
        )
        loaded = load_torch(path)
        assert read.keys() == loaded.keys()
        for name, array in loaded.items():
            dtype, shape, data = read[name]
            assert (dtype, tuple(shape)) == (f"torch.{array.dtype}", array.shape)
            assert bytes(data) == array.tobytes()


@needs_torch
def test_what_torch_writes_is_read(path):
    kinds = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 complex64"
    expected = in_torch(
        "import json, sys, torch\n"
        "torch.manual_seed(0)\n"
        "m = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))\n"
        "d = dict(m.state_dict(), tied=m[0].weight, turned=m[0].weight.T, row=m[0].weight[1:, ::2],"
        " scalar=torch.tensor(3.5), empty=torch.zeros(0, 2), flags=torch.tensor([True, False]))\n"
        "d.update({k: torch.arange(5).to(getattr(torch, k)) for k in sys.argv[2].split()})\n"
        "torch.save({'model': d, 'epoch': 3, 'who': 'me', 'rate': 0.1}, sys.argv[1])\n"
        "print(json.dumps({k: [str(v.dtype), list(v.shape), v.detach().contiguous().reshape(-1)"
        ".view(torch.uint8).tolist()] for k, v in d.items()}))",
        path,
        kinds,
    )
    loaded = load_torch(path)
    assert {f"model/{name}" for name in expected} == loaded.keys()
    for name, (dtype, shape, data) in expected.items():
        array = loaded[f"model/{name}"]
        assert (f"torch.{array.dtype}", array.shape) == (dtype, tuple(shape))
        assert array.tobytes() == bytes(data)


@needs_torch
def test_a_whole_module_is_refused(path):
    in_torch("import sys, torch; torch.save(torch.nn.Linear(1, 1), sys.argv[1]); print(0)", path)
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear"):
        load_torch(path)
