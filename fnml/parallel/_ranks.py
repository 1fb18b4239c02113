"""The processes of a run on this host."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from fnml.parallel._awake import Awake
from fnml.parallel._initialize import Place
from fnml.parallel._pulse import Beat, Pulse
from fnml.parallel._watchdog import Seen


class Ranks:
    """Start processes on this host, see how they are, and end them.

    Each is the leader of its own process group: a Ctrl-C in the terminal reaches the launcher
    alone, and what a process started ends with it. Process 0 writes to the terminal as it likes;
    the lines of the others get their number in front.

    Args:
      directory: a folder of this launcher alone, for the signs of life.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ranks: list[_Rank] = []

    def start(self, command: Sequence[str], places: Sequence[Place]) -> None:
        """Start a process at each place; those of before have to have ended.

        Raises:
          OSError: the command cannot be started; those that were are ended.
        """
        self.end()
        (self.directory / "run").unlink(missing_ok=True)
        try:
            for place in places:
                self._ranks.append(_Rank(command, place, self.directory))
        except OSError:
            self.end()
            raise

    def seen(self) -> list[Seen]:
        """Return how each process is."""
        return [rank.seen() for rank in self._ranks]

    def send(self, number: int) -> None:
        """Send a signal to every process that runs, and to what it has started."""
        for rank in self._ranks:
            rank.send(number)

    def end(self) -> None:
        """Kill what is left of the processes, and pass on the last lines they wrote."""
        self.send(signal.SIGKILL)
        for rank in self._ranks:
            rank.close()
        self._ranks = []


class _Rank:
    def __init__(self, command: Sequence[str], place: Place, directory: Path) -> None:
        self.index = place.index
        self._pulse = Pulse.make(directory / f"pulse.{place.index}")
        self._last: Beat | None = None
        self._clock, self._changed = Awake(), 0.0
        piped = None if place.index == 0 else subprocess.PIPE
        self._process = subprocess.Popen(
            [*command],
            stdin=subprocess.DEVNULL,
            stdout=piped,
            stderr=piped,
            env={**os.environ, **place.environment()},
            process_group=0,
        )
        streams = ((self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr))
        self._relays = [
            threading.Thread(target=_relay, args=(source, target, place.index), daemon=True)
            for source, target in streams
            if source is not None
        ]
        for relay in self._relays:
            relay.start()

    def seen(self) -> Seen:
        beat, now = self._pulse.read(), self._clock.now()
        if beat != self._last:
            self._last, self._changed = beat, now
        code = self._process.poll()
        idle = now - self._changed
        frozen = code is None and idle > 0.5 and _frozen(self._process.pid)
        return Seen(self.index, beat.arrived, beat.step, idle, frozen, code)

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        self._process.wait()
        for relay in self._relays:
            relay.join(timeout=5)


def _relay(source: IO[bytes], target: IO[str], index: int) -> None:
    """Pass lines on, with the process's number before each, until the process has ended."""
    with source:
        for line in source:
            text = line.decode(errors="replace").rstrip("\n")
            with contextlib.suppress(OSError, ValueError):
                target.write(f"[{index}] {text}\n")
                target.flush()


def _frozen(pid: int) -> bool:
    """Tell whether the system has stopped a process; elsewhere than on Linux nobody knows."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in ("T", "t")
