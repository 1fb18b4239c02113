"""Read a zip archive that nobody vouches for."""

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

# Deflate shrinks zeros about a thousandfold, weights hardly: what unpacks to more is no weights.
_RATIO = 100
_SMALL = 64 * 2**20
_PIECE = 2**20


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """Open an archive and yield it with its members by name; nothing is ever unpacked to disk.

    Raises:
      ValueError: two members have one name, one is packed in a way that weights are not, or all
        would unpack to more than a hundred times the file, and 64 MiB.
    """
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise ValueError("two of its members have one name")
        for name, info in members.items():
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name!r} is packed by method {info.compress_type}")
        total, size = sum(info.file_size for info in members.values()), path.stat().st_size
        if total > max(_SMALL, _RATIO * size):
            raise ValueError(f"its {size:,} bytes would unpack to {total:,}")
        yield archive, members


def read_array(file: IO[bytes], dtype: np.dtype, count: int) -> np.ndarray:
    """Read the ``count`` elements that are left in a member, to its end and its checksum.

    Raises:
      ValueError: the member is shorter or longer.
    """
    flat = np.empty(count, dtype)
    rest = flat.view(np.uint8).data if count else memoryview(b"")
    while rest and (piece := file.read(min(len(rest), _PIECE))):
        rest[: len(piece)] = piece
        rest = rest[len(piece) :]
    if rest or file.read(1):
        raise ValueError(f"{file.name!r} has not the {count * dtype.itemsize} bytes it should")
    flat.flags.writeable = False
    return flat
