"""Compare saved steps with their manifests."""

import hashlib
import os
import stat
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

from fnml.checkpoint import _manifest
from fnml.checkpoint._manifest import Manifest
from fnml.checkpoint._steps import META, committed, step_of
from fnml.core import CheckpointError


class Fault(NamedTuple):
    """What is wrong with one file of a saved step."""

    step: int
    file: str
    problem: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.file} {self.problem}"


def verify(path: str | os.PathLike[str]) -> dict[int, list[Fault]]:
    """Check saved steps against their manifests: every file's presence, size and SHA-256.

    Args:
      path: a checkpoint directory, or the directory of one step.

    Returns:
      For each step, in ascending order, its faults: an empty list means that it is whole.

    Raises:
      CheckpointError: ``path`` is no directory.

    >>> import tempfile
    >>> verify(tempfile.mkdtemp())
    {}
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such directory")
    steps = committed(path)
    step = step_of(path.absolute().name)
    if not steps and step is not None:
        steps = {step: path}
    return {step: verify_step(where, step)[1] for step, where in steps.items()}


def verify_step(
    path: Path, step: int, only: Container[str] | None = None
) -> tuple[Manifest | None, list[Fault]]:
    """Check one step; ``only`` names the files to hash, if not all.

    Returns:
      The manifest (``None`` if it cannot be trusted) and the faults.
    """
    try:
        manifest = read_manifest(path, step)
        found = _list_files(path)
    except (OSError, ValueError) as error:
        return None, [Fault(step, _manifest.NAME, str(error))]
    faults = []
    for name, expected in sorted(manifest.files.items()):
        status = found.pop(name, None)
        if status is None:
            faults.append(Fault(step, name, "is missing"))
        elif not stat.S_ISREG(status.st_mode):
            faults.append(Fault(step, name, "is no regular file"))
        elif status.st_size != expected.size:
            faults.append(
                Fault(step, name, f"has {status.st_size} bytes, expected {expected.size}")
            )
        elif only is None or name in only:
            try:
                actual = file_sha256(path / name)
            except OSError as error:
                faults.append(Fault(step, name, f"cannot be read ({error})"))
            else:
                if actual != expected.sha256:
                    faults.append(
                        Fault(step, name, f"has sha256 {actual}, expected {expected.sha256}")
                    )
    if META not in manifest.files:
        faults.append(Fault(step, META, "is not listed in the manifest"))
    faults += [
        Fault(step, name, "is not listed in the manifest") for name in sorted(found.keys() - {META})
    ]
    return manifest, faults


def read_manifest(path: Path, step: int) -> Manifest:
    """Read the manifest of the step in ``path``.

    Raises:
      ValueError: it is missing or cannot be trusted.
    """
    file = path / _manifest.NAME
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is no regular file")
        if status.st_size > _manifest.JSON_LIMIT:
            raise ValueError(f"has {status.st_size:,} bytes: too many")
        data = file.read_bytes()
    except FileNotFoundError:
        raise ValueError("is missing") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error})") from None
    return _manifest.parse(data, step)


def file_sha256(path: Path) -> str:
    """Hash a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _list_files(root: Path) -> dict[str, os.stat_result]:
    """Return everything below ``root`` but plain directories and the manifest; links stay links."""
    found = {}
    for folder, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = Path(folder, name)
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode):
                found[path.relative_to(root).as_posix()] = status
    found.pop(_manifest.NAME, None)
    return found
