"""ArraySource: what it gathers, refuses, and how it is recognised."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnml.core import DataError
from fnml.data import ArraySource

DTYPES = st.sampled_from([np.uint8, np.int32, np.int64, np.float16, np.float32, bool])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 30), dtype=DTYPES, tail=st.lists(st.integers(1, 3)))
def test_gather_is_indexing_into_new_arrays(data, n, dtype, tail):
    values = np.random.default_rng(n).integers(0, 2, (n, *tail)).astype(dtype)
    source = ArraySource({"x": values[::-1], "i": np.arange(n)})
    indices = np.array(data.draw(st.lists(st.integers(0, n - 1))), np.int64)
    batch = source.gather(indices)
    assert batch["x"].dtype == dtype and batch["x"].shape == (len(indices), *tail)
    assert batch["x"].tobytes() == values[n - 1 - indices].tobytes()
    assert batch["i"].tolist() == indices.tolist()
    assert not np.shares_memory(batch["x"], values)
    batch["x"][:] = 0
    assert np.array_equal(source.gather(indices)["x"], values[n - 1 - indices])


def test_every_fault_is_listed():
    with pytest.raises(DataError) as caught:
        ArraySource(
            {
                "objects": np.array([{}, {}]),
                "scalar": np.array(3),
                "short": np.zeros(2),
                "long": np.zeros(5),
                "ragged": [[1], [1, 2]],
                "none": np.zeros((0, 4)),
            }
        )
    message = str(caught.value)
    for part in ("'objects' has dtype object", "'scalar' is a scalar", "'ragged' is not an array"):
        assert part in message
    assert "'none' has shape (0, 4)" in message
    assert "'short' has 2" in message and "'long' has 5" in message
    with pytest.raises(DataError, match="at least one"):
        ArraySource({})


@pytest.mark.parametrize("bad", [[-1], [3], [0, 1, 99], [[0]], [0.0]])
def test_bad_indices_are_refused(bad):
    with pytest.raises(DataError, match="ArraySource"):
        ArraySource({"x": np.arange(3)}).gather(np.array(bad))


def test_the_message_names_the_index():
    with pytest.raises(DataError, match=r"index -2 \(entry 1 of 3\).*0 to 4"):
        ArraySource({"x": np.arange(5)}).gather(np.array([0, -2, 1]))


def test_fingerprint_follows_names_dtypes_shapes_and_content():
    base = {"x": np.arange(12, dtype=np.int32), "y": np.zeros(12, np.int32)}
    changed = base["x"].copy()
    changed[7] = 0
    variants = [
        base,
        base | {"x": changed},
        {"z": base["x"], "y": base["y"]},
        {"x": base["y"], "y": base["x"]},
        base | {"x": base["x"].view(np.uint32)},
        base | {"x": base["x"].reshape(12, 1)},
        base | {"x": base["x"].astype(">i4")},
        {"x": base["x"]},
    ]
    prints = [ArraySource(arrays).fingerprint for arrays in variants]
    assert len(set(prints)) == len(variants)
    again = {"y": base["y"].copy(), "x": np.repeat(base["x"], 2)[::2]}
    assert ArraySource(again).fingerprint == prints[0]


def test_fingerprint_of_large_arrays_samples_them(tmp_path):
    size = 1 << 26
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(size)

    def fingerprint():
        return ArraySource({"x": np.memmap(path, np.uint8, "r")}).fingerprint

    def write(at, value):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(value)

    empty = fingerprint()
    for at in (0, size - 1):
        write(at, b"\1")
        assert fingerprint() != empty
        write(at, b"\0")
    assert fingerprint() == empty
    # A change as long as the gap between two of the 256 blocks cannot be missed.
    write(size // 3, b"\1" * (size // 255))
    assert fingerprint() != empty
