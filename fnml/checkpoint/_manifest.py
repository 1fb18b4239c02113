"""The manifest of a saved step: what was written, in a form that protects itself."""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fnml.checkpoint._tree import Leaf

NAME = "manifest.json"
JSON_LIMIT = 64 * 2**20
_FORMAT = "fnml-checkpoint"
_VERSION = 1


class File(NamedTuple):
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a step holds.

    Attributes:
      step: the training step.
      metric: what "best" goes by; ``None`` where it was not given, NaN or infinite.
      created: UTC time, ISO 8601.
      files: every file but the manifest, by path relative to the step's directory.
      tree: every array of the state, by path.
    """

    step: int
    metric: float | None
    created: str
    files: Mapping[str, File]
    tree: Mapping[str, Leaf]


def render(manifest: Manifest) -> bytes:
    """Write a manifest as JSON with the SHA-256 of its own remaining text."""
    body = {
        "format": _FORMAT,
        "version": _VERSION,
        "step": manifest.step,
        "metric": manifest.metric,
        "created": manifest.created,
        "files": {path: file._asdict() for path, file in manifest.files.items()},
        "tree": {
            name: {key: value for key, value in leaf._asdict().items() if value is not None}
            for name, leaf in manifest.tree.items()
        },
    }
    return _text({**body, "sha256": _sha256(body)})


def _text(document: Any) -> bytes:
    return json.dumps(document, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def _sha256(body: Any) -> str:
    return hashlib.sha256(_text(body)).hexdigest()


def load_json(data: bytes) -> Any:
    """Parse JSON from a file that nobody vouches for.

    Raises:
      ValueError: it is too long, too deep, or no JSON.
    """
    if len(data) > JSON_LIMIT:
        raise ValueError(f"has {len(data):,} bytes, more than the limit of {JSON_LIMIT:,}")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not valid JSON ({error})") from None


def parse(data: bytes, step: int) -> Manifest:
    """Read the manifest of ``step``; its own text has to be exactly the text that was written.

    Raises:
      ValueError: says what is wrong with it.
    """
    body = load_json(data)
    if not isinstance(body, dict) or body.get("format") != _FORMAT:
        raise ValueError(f"is no {_FORMAT} manifest")
    if body.get("version") != _VERSION:
        raise ValueError(
            f"has version {body.get('version')!r}, this fnml reads {_VERSION}: upgrade fnml"
        )
    stored = body.pop("sha256", None)
    try:
        intact = stored == _sha256(body) and data == _text({**body, "sha256": stored})
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise ValueError("does not match its own sha256: it was changed after it was written")
    manifest = _typed(body)
    if manifest.step != step:
        raise ValueError(f"belongs to step {manifest.step}, not {step}")
    return manifest


def _typed(body: Mapping[str, Any]) -> Manifest:
    """Check every field: a correct hash does not make the writer trustworthy."""
    metric: Any = body.get("metric")
    # Compared, not converted: an integer may be too large for a float.
    finite = type(metric) in (int, float) and abs(metric) <= sys.float_info.max
    if not (metric is None or finite):
        raise ValueError(f"has the metric {metric!r}, expected a finite number or null")
    if not _is_size(body.get("step")):
        raise ValueError(f"has the step {body.get('step')!r}, expected a count")
    if [type(body.get(key)) for key in ("created", "files", "tree")] != [str, dict, dict]:
        raise ValueError("has no creation time, no files or no tree")
    return Manifest(
        body["step"],
        metric,
        body["created"],
        {path: _file(path, entry) for path, entry in body["files"].items()},
        {name: _leaf(name, entry) for name, entry in body["tree"].items()},
    )


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _file(path: str, entry: Any) -> File:
    segments = path.split("/")
    if {"", ".", ".."} & set(segments) or "\\" in path or "\0" in path or path == NAME:
        raise ValueError(f"lists {path!r}, which is no path inside the step's directory")
    if (
        not isinstance(entry, dict)
        or entry.keys() != {"size", "sha256"}
        or not _is_size(entry["size"])
        or not isinstance(entry["sha256"], str)
    ):
        raise ValueError(f"describes the file {path!r} as {entry!r}, expected size and sha256")
    return File(**entry)


def _leaf(name: str, entry: Any) -> Leaf:
    if (
        not isinstance(entry, dict)
        or not {"shape", "dtype"} <= entry.keys() <= {"shape", "dtype", "impl"}
        or not isinstance(entry["shape"], list)
        or not all(map(_is_size, entry["shape"]))
        or not isinstance(entry["dtype"], str)
        or not isinstance(entry.get("impl", ""), str)
    ):
        raise ValueError(f"describes the array {name!r} as {entry!r}, expected shape and dtype")
    return Leaf(tuple(entry["shape"]), entry["dtype"], entry.get("impl"))
