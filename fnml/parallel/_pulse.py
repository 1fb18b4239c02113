"""Three numbers that a process shares with whoever watches over it."""

import os
from typing import NamedTuple

import numpy as np

_ARRIVED, _STEP, _BEATS = range(3)


class Beat(NamedTuple):
    """What a process has said of itself.

    Attributes:
      arrived: 1 once it calls the coordinator, 2 once it has met all the others, 0 before.
      step: how many training steps it has done, -1 before the first.
      beats: grows with every sign of life.
    """

    arrived: int
    step: int
    beats: int


class Pulse:
    """A process's signs of life, in a file that both sides map into memory.

    A beat costs less than a microsecond and no system call, so that every step can afford one.

    Args:
      path: the file; the watching side makes it with :meth:`make`.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp(), "pulse")
    >>> watched = Pulse.make(path)
    >>> Pulse(path).beat(7)
    >>> watched.read()
    Beat(arrived=0, step=7, beats=1)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._numbers = np.memmap(path, np.int64, "r+", shape=(3,))

    @staticmethod
    def make(path: str | os.PathLike[str]) -> "Pulse":
        """Make the file, for a process that is about to start."""
        np.array([0, -1, 0], np.int64).tofile(path)
        return Pulse(path)

    def arrive(self, stage: int) -> None:
        """Say how far the process has come in meeting the others; see :class:`Beat`."""
        self._numbers[_ARRIVED] = stage
        self.beat()

    def beat(self, step: int | None = None) -> None:
        """Say that the process gets on; with ``step``, how far it is."""
        if step is not None:
            self._numbers[_STEP] = step
        self._numbers[_BEATS] += 1

    def read(self) -> Beat:
        """Return what the process has said last."""
        arrived, step, beats = self._numbers.tolist()
        return Beat(arrived, step, beats)
