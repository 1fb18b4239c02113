"""The directories of a checkpoint directory: which step is where, and which are leftovers.

``00000120``        a committed step
``.tmp-120-4711``   being written, or being deleted, by process 4711
``.old-120-4711``   the step 120 that process 4711 is replacing: it counts until the new one is there

A step holds ``arrays/`` (Orbax), ``meta.json`` and, written last, ``manifest.json``.
"""

import os
import re
import shutil
from pathlib import Path

ARRAYS = "arrays"
META = "meta.json"

_LEFTOVER = re.compile(r"\.(tmp|old)-(\d{1,19})-(\d{1,10})")


def step_name(step: int) -> str:
    """Return the name of a step's directory."""
    return f"{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step that a directory's name stands for, or ``None``."""
    return int(name) if re.fullmatch(r"\d{8,19}", name) and step_name(int(name)) == name else None


def temporary(directory: Path, step: int) -> Path:
    """Return where this process writes, or deletes, a step: never taken for a committed one."""
    return directory / f".tmp-{step}-{os.getpid()}"


def aside(directory: Path, step: int) -> Path:
    """Return where a step waits while this process replaces it."""
    return directory / f".old-{step}-{os.getpid()}"


def committed(directory: Path) -> dict[int, Path]:
    """Return the committed steps and their directories, in ascending order."""
    found: dict[int, Path] = {}
    replaced: dict[int, Path] = {}
    for entry in directory.iterdir() if directory.is_dir() else ():
        if entry.is_symlink() or not entry.is_dir():
            continue
        leftover = _LEFTOVER.fullmatch(entry.name)
        if (step := step_of(entry.name)) is not None:
            found[step] = entry
        elif leftover and leftover[1] == "old":
            replaced[int(leftover[2])] = entry
    return dict(sorted({**replaced, **found}.items()))


def delete(directory: Path, step: int, path: Path) -> None:
    """Delete a step, so that at no instant a part of it looks like a committed step."""
    trash = temporary(directory, step)
    if trash.exists():
        shutil.rmtree(trash)
    path.rename(trash)
    shutil.rmtree(trash)


def clean(directory: Path) -> None:
    """Finish or drop what processes that are gone, or this one, left behind."""
    for entry in sorted(directory.iterdir()):
        leftover = _LEFTOVER.fullmatch(entry.name)
        if not leftover or entry.is_symlink() or not entry.is_dir():
            continue
        kind, step, pid = leftover[1], int(leftover[2]), int(leftover[3])
        if pid != os.getpid() and _is_alive(pid):
            continue
        final = directory / step_name(step)
        if kind == "old" and not final.exists():
            entry.rename(final)
        else:
            shutil.rmtree(entry)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
