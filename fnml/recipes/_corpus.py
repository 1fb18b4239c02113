"""Text to train on: files, or the Python standard library's own source."""

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fnml.core import DataError

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_EVERY = 20


class Corpus(NamedTuple):
    """Text in two parts that share no file, as bytes."""

    train: bytes
    held_out: bytes


def standard_library() -> Corpus:
    """Read the source of the running Python's standard library, without its tests.

    Every 20th module, in the order of their paths, is held out. The text differs between Python
    versions.

    Raises:
      DataError: this Python comes without its library's source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        (path.relative_to(root) for path in root.rglob("*.py") if path.is_file()),
        key=lambda path: path.parts,
    )
    kept = [path for path in files if not _SKIPPED.intersection(path.parts)]
    if len(kept) < _EVERY:
        raise DataError(
            f"{root} has {len(kept)} source files: this Python comes without its library's "
            "source. Name other text with --text FILE..."
        )
    return _divided([(root / path).read_bytes() for path in kept])


def read_files(paths: Sequence[str]) -> Corpus:
    """Read text files as bytes; every 20th file is held out, or the last 5% of fewer files.

    Raises:
      DataError: files are missing, unreadable or empty; all of them are listed.
    """
    texts, faults = [], []
    for path in paths:
        try:
            texts.append(Path(path).read_bytes())
            if not texts[-1].strip():
                faults.append(f"{path}: is empty")
        except OSError as error:
            faults.append(f"{path}: {error.strerror or error}")
    if faults:
        raise DataError("this text cannot be used:\n" + "\n".join(faults))
    if len(texts) >= _EVERY:
        return _divided(texts)
    text = b"\n".join(texts)
    cut = len(text) - max(len(text) // _EVERY, 1)
    return Corpus(text[:cut], text[cut:])


def _divided(texts: Sequence[bytes]) -> Corpus:
    return Corpus(
        b"\n".join(text for i, text in enumerate(texts) if i % _EVERY != _EVERY - 1),
        b"\n".join(text for i, text in enumerate(texts) if i % _EVERY == _EVERY - 1),
    )
