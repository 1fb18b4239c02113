"""Every reader refuses what it cannot read by a named error, and by nothing else."""

import collections
import functools
import json
import logging

import pytest
from fuzz_cases import inputs, outcome, readers, sealed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Orbax reads arrays in coroutines; when one fails, others still answer to the loop that is closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

NAMES = (
    "safetensors", "npz", "torch", "tokens", "config", "result", "jsonl", "csv", "manifest",
    "forged", "run", "tokenizer", "onnx",
)  # fmt: skip
COUNT = 200


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """A spoilt manifest is warned of, once for each input."""
    logger = logging.getLogger("fnml.checkpoint")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return readers(tmp_path_factory.mktemp("seeds") / "seeds")


def test_the_list_is_of_all_readers(cases):
    assert set(NAMES) == set(cases)


@pytest.mark.parametrize("name", NAMES)
def test_whole_files_are_read_and_spoilt_ones_refused_by_name(cases, tmp_path, name):
    reader = cases[name]
    for file, files in reader.seeds:
        assert outcome(reader, file, files, tmp_path / "x") == ("accepted", None), file
    counts = collections.Counter()
    for number, (file, files) in enumerate(inputs(reader, 0, COUNT)):
        kind, error = outcome(reader, file, files, tmp_path / "x")
        counts[kind] += 1
        if kind == "crash":
            raise AssertionError(f"input {number} of seed 0, in {file}") from error
    # A reader that refused nothing would pass otherwise.
    assert counts["accepted"] < 0.75 * COUNT
    # Nothing may have been written beside the folder.
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def changed(name, key, value):
    """Return a spoil that sets one value of a JSON file."""
    path = key.split("|")

    def spoil(data):
        document = json.loads(data)
        holder = functools.reduce(lambda item, part: item[part], path[:-1], document)
        if value is None:
            del holder[path[-1]]
        else:
            holder[path[-1]] = value
        return sealed(document) if name == "manifest" else json.dumps(document).encode()

    return name, spoil


FOUND = {
    "a field that has no default": changed("config", "config|mlp|outputs", None),
    "more micro-batches than can be counted": (
        "config",
        lambda data: (
            data.replace(b'"accumulate": 1', b'"accumulate": 6442450944')
            .replace(b'"batch_size": 128', b'"batch_size": 6442450944')
            .replace(b'"devices": 1', b'"devices": 5')
        ),
    ),
    "a metric that is no float": changed("result", "eval|loss", 10**400),
    "a row that is no float": ("jsonl", lambda data: data.replace(b"0.5", b"1" + b"0" * 400, 1)),
    "a row without end": ("jsonl", lambda data: b"[" * 100_000 + b"\n" + data),
    "the metric of a step that is no float": changed("manifest", "metric", 10**400),
    "a dtype that is no text": changed("manifest", "tree|step|dtype", "\ud800"),
    "a dtype that is Python": changed("manifest", "tree|step|dtype", "04i,f4"),
    "a dtype of objects": changed("manifest", "tree|step|dtype", "object"),
    "an array that is not there": changed(
        "manifest", "tree|there", {"shape": [2], "dtype": "int8"}
    ),
    "tokens that are not counted from 0": (
        "tokenizer",
        lambda data: data.replace(b": 1,", b": 4294967295,", 1).replace(b":1,", b":4294967295,", 1),
    ),
}


@pytest.mark.parametrize("found", FOUND)
def test_what_fuzzing_found_stays_refused(cases, tmp_path, found):
    name, spoil = FOUND[found]
    file, files = cases[name].seeds[0]
    spoilt = spoil(files[file])
    assert spoilt != files[file]
    kind, error = outcome(cases[name], file, {**files, file: spoilt}, tmp_path / "x")
    assert kind not in ("crash", "accepted"), error


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=400))
def test_any_bytes_are_refused_by_name(cases, tmp_path, name, data):
    reader = cases[name]
    file, files = reader.seeds[-1]
    kind, error = outcome(reader, file, {**files, file: data}, tmp_path / "x")
    assert kind != "crash", (file, error)
