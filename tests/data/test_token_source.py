"""TokenSource and write_tokens: exact windows, streamed files, damaged files refused."""

import io
import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fnml.core import DataError
from fnml.data import TokenSource, write_tokens


@settings(max_examples=80, deadline=None)
@given(
    length=st.integers(2, 60),
    window=st.integers(1, 12),
    stride=st.none() | st.integers(1, 15),
    dtype=st.sampled_from(["u1", "<u2", ">u2", "i4", "i8", "u4"]),
    data=st.data(),
)
def test_windows_are_slices(length, window, stride, dtype, data):
    tokens = np.random.default_rng(length).integers(0, 200, length).astype(dtype)
    if length < window + 1:
        with pytest.raises(DataError, match=f"holds {length} tokens.*takes {window + 1}"):
            TokenSource(tokens, window, stride)
        return
    source = TokenSource(tokens, window, stride)
    step = stride or window
    starts = [i for i in range(0, length, step) if i + window + 1 <= length]
    assert len(source) == len(starts)
    indices = np.array(data.draw(st.lists(st.integers(0, len(starts) - 1))), np.int64)
    batch = source.gather(indices)
    for name, shift in (("tokens", 0), ("targets", 1)):
        value = batch[name]
        assert value.dtype == np.int32 and value.shape == (len(indices), window)
        assert value.flags.c_contiguous and not np.shares_memory(value, tokens)
        for row, index in zip(value, indices, strict=True):
            start = starts[index] + shift
            assert row.tolist() == tokens[start : start + window].tolist()


def test_by_default_every_token_but_the_first_is_a_target_once():
    source = TokenSource(np.arange(41), window=8)
    targets = source.gather(np.arange(len(source)))["targets"]
    assert targets.ravel().tolist() == list(range(1, 41))


def test_a_file_is_mapped_and_equals_the_array(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 60_000, 1000).astype(np.uint16)
    path = tmp_path / "tokens.npy"
    np.save(path, tokens)
    for form in (path, str(path)):
        mapped = TokenSource(form, window=7)
        plain = TokenSource(tokens, window=7)
        indices = np.arange(len(plain))
        for name, value in plain.gather(indices).items():
            assert np.array_equal(mapped.gather(indices)[name], value)
        assert mapped.fingerprint == plain.fingerprint
        assert isinstance(mapped.tokens.base, np.memmap)
    assert TokenSource(tokens, 7, 3).fingerprint != plain.fingerprint
    assert TokenSource(tokens, 8, 7).fingerprint != plain.fingerprint


def test_every_fault_is_listed():
    with pytest.raises(DataError) as caught:
        TokenSource(np.zeros((3, 3)), window=0, stride=-1)
    for part in ("window is 0", "stride is -1", "dtype is float64", "shape is (3, 3)"):
        assert part in str(caught.value)


def test_tokens_beyond_int32_are_refused_by_name():
    tokens = np.arange(20, dtype=np.int64)
    tokens[11] = 2**31
    source = TokenSource(tokens, window=4)
    assert source.gather(np.array([0, 1]))["tokens"].shape == (2, 4)
    with pytest.raises(DataError, match=r"token 11 is 2147483648.*example 2"):
        source.gather(np.array([0, 2]))


def test_missing_file_names_the_path(tmp_path):
    with pytest.raises(DataError, match=r"none\.npy.*No such file.*write_tokens"):
        TokenSource(tmp_path / "none.npy", window=2)
    with pytest.raises(DataError, match="damaged"):
        TokenSource(tmp_path, window=2)


def saved(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def with_header(text, body=b"\0" * 64, version=(1, 0)):
    text = text.encode() + b"\n"
    return (
        np.lib.format.magic(*version)
        + len(text).to_bytes(2 if version[0] == 1 else 4, "little")
        + text
        + body
    )


WHOLE = saved(np.arange(40, dtype=np.uint16))
DAMAGED = {
    "empty file": b"",
    "no tokens": saved(np.zeros(0, np.uint16)),
    "floats": saved(np.zeros(40)),
    "bools": saved(np.zeros(40, bool)),
    "matrix": saved(np.zeros((4, 10), np.uint16)),
    "scalar": saved(np.array(3)),
    "objects": saved(np.array([{}] * 40), allow_pickle=True),
    "zip archive": b"PK\x03\x04" + WHOLE,
    "text": b"hello tokens " * 20,
    "body cut": WHOLE[:-1],
    "header cut": WHOLE[:60],
    "giant": with_header("{'descr': '<u2', 'fortran_order': False, 'shape': (1099511627776,), }"),
    "beyond int64": with_header(
        f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({10**30},)}}"
    ),
    "negative": with_header("{'descr': '<u2', 'fortran_order': False, 'shape': (-5,), }"),
    "no number": with_header("{'descr': '<u2', 'fortran_order': False, 'shape': ('a',), }"),
    "code": with_header("__import__('os').abort()"),
    "deep": with_header("(" * 5000),
    "header of 4 GB": np.lib.format.magic(2, 0) + b"\xff" * 4 + b"{}",
    "python 2": with_header("{'descr': '<u2', 'fortran_order': False, 'shape': (5L,), }"),
    "records": with_header("{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (8,), }"),
    "version 9": with_header("{}", version=(9, 0)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_with_the_path(tmp_path, name):
    path = tmp_path / "damaged.npy"
    path.write_bytes(DAMAGED[name])
    with pytest.raises(DataError, match=r"damaged\.npy"):
        TokenSource(path, window=4)


@pytest.mark.parametrize("name", ["giant", "header of 4 GB"])
def test_sizes_claimed_by_a_header_are_not_allocated(tmp_path, name):
    path = tmp_path / "damaged.npy"
    path.write_bytes(DAMAGED[name])
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            TokenSource(path, window=4)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=300, deadline=None)
@given(
    cut=st.integers(0, len(WHOLE)),
    edits=st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=4),
    tail=st.binary(max_size=16),
)
@example(cut=len(WHOLE), edits=[], tail=b"")
def test_a_fuzzed_file_is_read_or_refused(tmp_path_factory, cut, edits, tail):
    data = bytearray(WHOLE)
    for at, value in edits:
        data[at] = value
    path = tmp_path_factory.getbasetemp() / f"fuzzed{os.getpid()}.npy"
    path.write_bytes(bytes(data[:cut]) + tail)
    try:
        source = TokenSource(path, window=4)
    except DataError as error:
        assert path.name in str(error)
        assert edits or cut < len(WHOLE)
    else:
        assert len(source.gather(np.arange(len(source)))["tokens"]) == len(source)


@settings(max_examples=40, deadline=None)
@given(
    chunks=st.lists(st.lists(st.integers(0, 255), max_size=20), min_size=1),
    dtype=st.sampled_from(["u1", "<u2", ">u2", "i4", "i8"]),
)
def test_write_tokens_streams_what_concatenate_gives(tmp_path_factory, chunks, dtype):
    path = tmp_path_factory.getbasetemp() / f"written{os.getpid()}.npy"
    whole = [token for chunk in chunks for token in chunk]
    if not whole:
        with pytest.raises(DataError, match="no token"):
            write_tokens(path, chunks, dtype)
        return
    assert write_tokens(path, (np.array(chunk, np.int64) for chunk in chunks), dtype) == len(whole)
    loaded = np.load(path, allow_pickle=False)
    assert loaded.dtype == np.dtype(dtype) and loaded.tolist() == whole
    # The same bytes as NumPy's own file, but for the padding of the header.
    assert path.read_bytes()[-loaded.nbytes :] == loaded.tobytes()


def interrupted():
    yield np.arange(5)
    raise KeyboardInterrupt("stopped")


@pytest.mark.parametrize(
    ("chunks", "dtype", "error", "message"),
    [
        (interrupted(), "u2", KeyboardInterrupt, "stopped"),
        ([[1, 2], [3, 256, 4]], "u1", DataError, r"chunk 1: token 3 is 256.*0 to 255"),
        ([[1], [-1]], "u2", DataError, "token 1 is -1"),
        ([[1.5]], "u2", DataError, "float64"),
        ([[[1]]], "u2", DataError, r"shape \(1, 1\)"),
        ([[1]], "f4", DataError, "float32"),
        ([], "u2", DataError, "no token"),
    ],
)
def test_a_failed_write_keeps_the_old_file(tmp_path, chunks, dtype, error, message):
    path = tmp_path / "tokens.npy"
    path.write_bytes(WHOLE)
    with pytest.raises(error, match=message):
        write_tokens(path, chunks, dtype)
    assert path.read_bytes() == WHOLE
    assert list(tmp_path.iterdir()) == [path]
