"""Readers of untrusted files, whole files to begin from, and ways to spoil them."""

import hashlib
import io
import itertools
import json
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import onnx_seeds

from fnml import recipes
from fnml.checkpoint import (
    Checkpointer,
    load_npz,
    load_safetensors,
    load_torch,
    restore,
    restore_meta,
    save_npz,
    save_safetensors,
    save_torch,
    tree_sha256,
    verify,
)
from fnml.core import FnmlError, Row, RunError
from fnml.data import TokenSource, write_tokens
from fnml.recipes import verify_run
from fnml.recipes._run_directory import create, write_result
from fnml.recipes._tokenizer import BpeTokenizer, train_bpe
from fnml.sinks import Csv, Jsonl, read_jsonl

Spoil = Callable[[random.Random, bytes], bytes]
Outcome = tuple[str, BaseException | None]

_NUMBERS = (0, 1, 7, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)
_WORDS = ("", "..", "../../x", "/etc/passwd", "\0", "\ud800", "NaN", "x" * 300, "w", "é")
_VALUES: tuple[Any, ...] = (
    None, True, -1, 1.5, 1e400, -(10**30), 10**4000, *_NUMBERS, *_WORDS, [], {}, [[]], [2**62] * 3,
)  # fmt: skip


class Reader(NamedTuple):
    """One kind of file.

    Attributes:
      seeds: files that are read without an error: the file to spoil by its place in a folder, and
        all files of the folder.
      spoils: what to do to it.
      read: reads the folder's file, and uses what it holds.
    """

    seeds: Sequence[tuple[str, dict[str, bytes]]]
    spoils: Sequence[Spoil]
    read: Callable[[Path, str], object]


def flip(rng: random.Random, data: bytes) -> bytes:
    """Flip up to eight bits."""
    spoilt = bytearray(data)
    for _ in range(rng.randint(1, 8) if data else 0):
        spoilt[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(spoilt)


def cut(rng: random.Random, data: bytes) -> bytes:
    """Truncate, or take a piece out."""
    start = rng.randrange(len(data) + 1)
    return data[:start] + (b"" if rng.random() < 0.5 else data[rng.randint(start, len(data)) :])


def repeat(rng: random.Random, data: bytes) -> bytes:
    """Insert a piece of the file, or random bytes, elsewhere."""
    start = rng.randrange(len(data) + 1)
    piece = data[start : start + rng.randint(1, 64)]
    piece = piece if rng.random() < 0.5 else rng.randbytes(rng.randint(1, 64))
    at = rng.randrange(len(data) + 1)
    return data[:at] + piece + data[at:]


def number(rng: random.Random, data: bytes) -> bytes:
    """Write a number at the edge of a type over the file."""
    form = rng.choice(("<B", "<H", "<I", "<Q", ">I"))
    size = struct.calcsize(form)
    if len(data) <= size:
        return data + rng.randbytes(size)
    at = rng.randrange(len(data) - size)
    value = rng.choice(_NUMBERS) & (1 << 8 * size) - 1
    return data[:at] + struct.pack(form, value) + data[at + size :]


def digits(rng: random.Random, data: bytes) -> bytes:
    """Replace a run of digits in text by another number or word."""
    places = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
    if not places:
        return flip(rng, data)
    at = rng.choice(places)
    word = rng.choice(("-1", "1e999", "nan", "", "0" * 50, "9" * 5000, str(rng.choice(_NUMBERS))))
    return data[:at] + word.encode() + data[at + 1 :]


def noise(rng: random.Random, data: bytes) -> bytes:
    """Forget the file but for its beginning."""
    keep = rng.choice((0, 0, 2, 8, 64))
    return data[:keep] + rng.randbytes(rng.randrange(512))


def nest(rng: random.Random, data: bytes) -> bytes:
    """Nest brackets deeply."""
    depth = rng.choice((100, 1_000, 100_000))
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice((b"[", b'{"a":', b"(", b"]\x85")) * depth + data[at:]


BYTES: tuple[Spoil, ...] = (flip, cut, repeat, number, digits, noise, nest)


def json_value(rng: random.Random, data: bytes) -> bytes:
    """Replace, remove, rename or double one value of a JSON document."""
    document = json.loads(data)
    return json.dumps(spoilt_json(rng, document)).encode() + b"\n"


def spoilt_json(rng: random.Random, document: Any) -> Any:
    """Change one place of a JSON document."""
    places = list(_places(document))
    if not places:
        return rng.choice(_VALUES)
    holder, key = rng.choice(places)
    action = rng.randrange(4)
    if action == 0:
        holder.pop(key)
    elif action == 1 and isinstance(holder, dict):
        holder[rng.choice(_WORDS)] = holder.pop(key)
    elif action == 2:
        other, place = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[place])) if place in _keys(other) else None
    else:
        holder[key] = rng.choice(_VALUES)
    return document


def _keys(holder: Any) -> Any:
    return holder if isinstance(holder, dict) else range(len(holder))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)


def json_line(rng: random.Random, data: bytes) -> bytes:
    """Change one value in one line of JSON lines."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json_value(rng, lines[at]).strip()
    return b"\n".join(lines) + b"\n"


def safetensors_header(rng: random.Random, data: bytes) -> bytes:
    """Change one value of the header and keep its length right."""
    length = int.from_bytes(data[:8], "little")
    header = json_value(rng, data[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def zip_member(rng: random.Random, data: bytes) -> bytes:
    """Spoil one member of an archive, or its name, and keep the checksums right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = rng.randrange(len(members))
    name, body = members[at]
    if rng.random() < 0.1:
        members[at] = (rng.choice(("../x.npy", "/x", "x/data.pkl", "x", members[0][0])), body)
    elif rng.random() < 0.1:
        del members[at]
    else:
        members[at] = (name, rng.choice(BYTES)(rng, body[: rng.choice((128, len(body)))]))
    out = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, body in dict(members).items():
            archive.writestr(name, body)
    return out.getvalue()


def npy_header(rng: random.Random, data: bytes) -> bytes:
    """Change a word of a ``.npy`` header and keep its length right."""
    header = data[10:128].decode().strip()
    old = rng.choice(("<u2", "False", "(", ")", "shape", "descr", "'", "4", ","))
    new = rng.choice(
        ("|O", "<f8", ">u8", "True", "(-1,)", "((((", "2**60", "9" * 30, "", "[('a','<i4')]", "0,")
    )
    text = header.replace(old, new, 1).encode() + b"\n"
    return data[:8] + struct.pack("<H", len(text)) + text + data[128:]


def pickle_code(rng: random.Random, data: bytes) -> bytes:
    """Put other opcodes, or a call of what no weights need, into the pickle of an archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    (name,) = [name for name in members if name.endswith("data.pkl")]
    code = bytearray(members[name])
    opcodes = [getattr(pickle, n) for n in dir(pickle) if n.isupper()]
    opcodes = [opcode for opcode in opcodes if isinstance(opcode, bytes) and len(opcode) == 1]
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(2, len(code))
        piece = rng.choice((*opcodes, b"cos\nsystem\n", b"cbuiltins\neval\n", b"h\x00", b"(t"))
        code[at : at + rng.randint(0, 1)] = piece
    members[name] = bytes(code)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, body in members.items():
            archive.writestr(name, body)
    return out.getvalue()


def sealed_json(rng: random.Random, data: bytes) -> bytes:
    """Change a manifest and give it the hash of what it then says."""
    return sealed(spoilt_json(rng, json.loads(data)))


def sealed(document: Any) -> bytes:
    """Write a manifest with the hash of what it says."""

    def text(value: Any) -> bytes:
        return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"

    if not isinstance(document, dict):
        return text(document)
    document.pop("sha256", None)
    return text({**document, "sha256": hashlib.sha256(text(document)).hexdigest()})


def _files(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _arrays() -> dict[str, np.ndarray]:
    return {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "layers/b": np.array([True, False]),
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 2), np.float16),
    }


def _use(arrays: dict[str, np.ndarray]) -> int:
    return sum(len(array.tobytes()) for array in arrays.values())


def _weights(folder: Path) -> dict[str, list[tuple[str, dict[str, bytes]]]]:
    save_safetensors(
        folder / "a.safetensors", {**_arrays(), "h": jnp.ones(3, "bfloat16")}, {"a": "b"}
    )
    save_npz(folder / "a.npz", _arrays())
    np.savez_compressed(folder / "b.npz", **{**_arrays(), "f": np.ones((3, 2), order="F")})
    save_torch(folder / "a.pt", {**_arrays(), "h": jnp.ones(3, "bfloat16")})
    write_tokens(folder / "a.npy", [np.arange(40)])
    files = _files(folder)
    kinds = ("safetensors", "npz", "pt", "npy")
    return {
        kind: [(name, {name: data}) for name, data in files.items() if name.endswith(kind)]
        for kind in kinds
    }


def _run(folder: Path) -> dict[str, bytes]:
    """Make a run directory as small as one can be."""
    recipe = recipes.find_recipe("digits")
    record = {
        "recipe": "digits",
        "config": recipes.to_json(recipe.config()),
        "output": recipes.to_json(recipes.Output()),
        "environment": {"jax": "1"},
    }
    create(folder, record, {})
    sink = Jsonl(folder / "metrics.jsonl")
    table = Csv(folder / "metrics.csv")
    for step in range(0, 30, 5):
        for kind, values in (
            ("train", {"loss": 0.5}),
            ("eval", {"loss": float("nan"), "acc": 1.0}),
        ):
            sink.write(Row(step, kind, values, {"seconds": 0.1}))
            table.write(Row(step, kind, values))
    batch = recipe.config().run.batch_size
    with Checkpointer(folder / "checkpoints", keep_last=2) as checkpointer:
        for step in (10, 20):
            state = {"params": {"w": jnp.arange(6.0) + step}, "step": jnp.int32(step)}
            checkpointer.save(step, state, {"data": {"position": step * batch}}, metric=0.5)
    write_result(
        folder,
        {
            "recipe": "digits",
            "step": 20,
            "seconds": 1.5,
            "params_sha256": tree_sha256(state["params"]),
            "train": {"loss": float("nan")},
            "eval": {"loss": 0.5},
        },
    )
    return _files(folder)


def _read_config(folder: Path, _: str) -> None:
    record = recipes.read_record(folder)
    recipes.from_json(recipes.find_recipe(record["recipe"]).config, record["config"])
    recipes.from_json(recipes.Output, record["output"])


def _read_rows(folder: Path, name: str) -> None:
    read_jsonl(folder / name)
    Jsonl(folder / name, after=10).write(Row(11, "train", {"loss": 1.0}))
    read_jsonl(folder / name)


def _read_table(folder: Path, name: str) -> None:
    Csv(folder / name, after=10).write(Row(11, "train", {"loss": 1.0}))


def _read_step(folder: Path, _: str) -> None:
    verify(folder)
    restore_meta(folder)
    _use(restore(folder, on_skip=lambda _: None).state)


def _scan_run(folder: Path, _: str) -> None:
    if findings := verify_run(folder).findings:
        raise RunError(f"the scan finds {findings}")


def _read_forged(folder: Path, _: str) -> None:
    """Give the manifest of a step the sums of the files that are there, as a forger would."""
    step = folder / "00000020"
    body = json.loads((step / "manifest.json").read_bytes())
    body["files"] = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in _files(step).items()
        if name != "manifest.json"
    }
    (step / "manifest.json").write_bytes(sealed(body))
    _read_step(folder, "")


def _read_tokens(folder: Path, name: str) -> None:
    source = TokenSource(folder / name, window=3)
    source.gather(np.arange(min(len(source), 4)))
    assert source.fingerprint


def _read_tokenizer(folder: Path, name: str) -> None:
    tokenizer = BpeTokenizer((folder / name).read_bytes())
    tokenizer.decode(tokenizer.encode(b"to be or not to be\xff"))
    assert tokenizer.lengths.ndim == 1


def readers(folder: Path) -> dict[str, Reader]:
    """Return every reader by name; the files to begin from are made below ``folder``."""
    (folder / "weights").mkdir(parents=True)
    weights = _weights(folder / "weights")
    run = _run(folder / "run")
    prefix = "checkpoints/"
    step = {
        name.removeprefix(prefix): data
        for name, data in run.items()
        if name.startswith(f"{prefix}00000020/")
    }
    manifest = "00000020/manifest.json"
    text = b"to be, or not to be: that is the question. " * 20
    bpe = train_bpe(text, 262)

    def one(name: str) -> list[tuple[str, dict[str, bytes]]]:
        return [(name, {name: run[name]})]

    def path(load: Callable[[Path], Any]) -> Callable[[Path, str], object]:
        return lambda folder, name: _use(load(folder / name))

    json_spoils = (*BYTES, json_value, json_value, json_value)
    return {
        "safetensors": Reader(
            weights["safetensors"],
            (*BYTES, safetensors_header, safetensors_header, safetensors_header),
            path(load_safetensors),
        ),
        "npz": Reader(weights["npz"], (*BYTES, *[zip_member] * 5), path(load_npz)),
        "torch": Reader(
            weights["pt"], (*BYTES, *[zip_member] * 3, *[pickle_code] * 4), path(load_torch)
        ),
        "tokens": Reader(weights["npy"], (*BYTES, *[npy_header] * 3), _read_tokens),
        "config": Reader(one("config.json"), json_spoils, _read_config),
        "result": Reader(
            one("result.json"), json_spoils, lambda folder, _: recipes.read_result(folder)
        ),
        "jsonl": Reader(one("metrics.jsonl"), (*BYTES, *[json_line] * 3), _read_rows),
        "csv": Reader(one("metrics.csv"), BYTES, _read_table),
        "manifest": Reader([(manifest, step)], (*BYTES, *[sealed_json] * 7), _read_step),
        "forged": Reader([(name, step) for name in step if name != manifest], BYTES, _read_forged),
        "run": Reader([(name, run) for name in run], BYTES, _scan_run),
        "tokenizer": Reader([("bpe.json", {"bpe.json": bpe})], json_spoils, _read_tokenizer),
        "onnx": Reader(onnx_seeds.seeds(), (*BYTES, *[onnx_seeds.field] * 10), onnx_seeds.read),
    }


def spoil(rng: random.Random, reader: Reader) -> tuple[str, dict[str, bytes]]:
    """Choose a seed and spoil its file once or twice."""
    name, files = rng.choice(list(reader.seeds))
    data = files[name]
    for number in range(rng.choice((1, 1, 2))):
        # A structured change needs an intact file; after the first change only bytes are left.
        data = rng.choice(BYTES if number else list(reader.spoils))(rng, data)
    return name, {**files, name: data}


def outcome(reader: Reader, name: str, files: dict[str, bytes], folder: Path) -> Outcome:
    """Read a spoilt file in a new folder; say ``accepted``, the named error, or ``crash``."""
    shutil.rmtree(folder, ignore_errors=True)
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    try:
        reader.read(folder, name)
    except FnmlError as error:
        return type(error).__name__, error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a panic of a Rust library is no Exception
        return "crash", error
    return "accepted", None


def inputs(reader: Reader, seed: int, count: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield ``count`` spoilt files; equal seeds give equal files."""
    rng = random.Random(seed)
    yield from itertools.islice((spoil(rng, reader) for _ in itertools.count()), count)
