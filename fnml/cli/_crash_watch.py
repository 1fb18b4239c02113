"""See from outside how far a run is, and kill it there.

Nothing in a run knows of this: what is watched are the files that it writes anyway.
"""

import contextlib
import itertools
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from fnml.core import RunError

_POLL = 0.0005


class Moment(NamedTuple):
    """When to kill: at an event, and a random delay after it.

    Attributes:
      name: what the report calls it.
      event: which event (see :class:`Watch`), or ``None`` for the start of the process.
      span: the measured span over which the delay is spread, or ``None`` for a millisecond.
      signal: what is sent.
      cold: whether the process compiles anew, whatever the compilation cache holds.
    """

    name: str
    event: str | None
    span: str | None
    signal: int = signal.SIGKILL
    cold: bool = False


# Cycled through; the rarest first, so that few kills already see the delicate instants.
MOMENTS = (
    Moment("in a save", "saving", "save"),
    Moment("between manifest and rename", "sealed", None),
    Moment("just after the rename", "saved", None),
    Moment("compiling", "locked", "compile", cold=True),
    Moment("in the steps", "row", "gap"),
    Moment("while rows are written", "row", None),
    Moment("while an old step is deleted", "deleting", None),
    Moment("any time", None, "whole"),
    Moment("SIGTERM in the steps", "row", "gap", signal.SIGTERM),
    Moment("starting", None, "start"),
    Moment("just after the last save", "last", None),
)


class Watch:
    """Count what happens in a run directory since the watch began.

    Attributes:
      counts: how often each event was seen: ``locked`` (the process has the run), ``row`` (a
        metrics file grew), ``saving`` (a step's temporary directory appeared), ``sealed`` (a
        manifest appeared in one), ``saved`` (a step appeared), ``deleting`` (an old step's
        directory was renamed to be deleted), ``last`` (the last step appeared).
    """

    def __init__(self, directory: Path, pid: int, last: int) -> None:
        self.counts = dict.fromkeys(
            ("locked", "row", "saving", "sealed", "saved", "deleting", "last"), 0
        )
        self._directory, self._pid, self._last = directory, str(pid), last
        self._seen: set[tuple[str, str]] = {("saved", name) for name in self._names()}
        self._sizes: Mapping[str, int] | None = None

    def _names(self) -> list[str]:
        try:
            return os.listdir(self._directory / "checkpoints")  # noqa: PTH208 (half the time)
        except OSError:
            return []

    def look(self) -> None:
        """Take notice of what has happened since the last look."""
        if not self.counts["locked"]:
            with contextlib.suppress(OSError):
                if (self._directory / ".lock").read_text() == self._pid:
                    self.counts["locked"] = 1
            if not self.counts["locked"]:
                return
        names = self._names()
        newest = max((int(name) for name in names if name.isdigit()), default=-1)
        for name in names:
            if name.isdigit():
                self._note("saved", name)
                if int(name) == self._last:
                    self._note("last", name)
            elif name.startswith(".tmp-") and name.endswith(f"-{self._pid}"):
                if int(name.split("-")[1]) < newest:
                    self._note("deleting", name)
                    continue
                self._note("saving", name)
                if (self._directory / "checkpoints" / name / "manifest.json").exists():
                    self._note("sealed", name)
        sizes = {}
        for name in ("metrics.jsonl", "metrics.csv"):
            with contextlib.suppress(OSError):
                sizes[name] = (self._directory / name).stat().st_size
        if self._sizes is not None:
            before = self._sizes
            self.counts["row"] += any(size > before.get(name, 0) for name, size in sizes.items())
        self._sizes = sizes

    def _note(self, event: str, name: str) -> None:
        if (event, name) not in self._seen:
            self._seen.add((event, name))
            self.counts[event] += 1


class Spans(NamedTuple):
    """How long the parts of an uninterrupted run take, in seconds."""

    start: float
    compile: float
    save: float
    gap: float
    whole: float


class Ended(NamedTuple):
    """How a process ended: its exit code, when, and whether it was killed as planned."""

    code: int
    seconds: float
    killed: bool


def watch_to_end(process: subprocess.Popen, watch: Watch) -> Spans:
    """Let a run finish, and measure its parts."""
    began = time.monotonic()
    first: dict[str, float] = {}
    saves: list[float] = []
    spent: list[float] = []
    counts = dict(watch.counts)
    while process.poll() is None:
        watch.look()
        now = time.monotonic() - began
        for event, count in watch.counts.items():
            if count > counts[event]:
                first.setdefault(event, now)
                if event == "saving":
                    saves.append(now)
                if event == "saved" and saves:
                    spent.append(now - saves[-1])
        counts = dict(watch.counts)
        time.sleep(_POLL)
    whole = time.monotonic() - began
    locked = first.get("locked", whole)
    gaps = [b - a for a, b in itertools.pairwise(saves)]
    return Spans(
        start=locked,
        # The first steps are in this time as well.
        compile=0.7 * max(first.get("row", whole) - locked, 0.0),
        # Not the longest ones: a machine that was busy once would put kills past the end.
        save=statistics.median(spent or [0.1]),
        gap=statistics.median(gaps or [whole - locked]),
        whole=whole,
    )


def kill_at(
    process: subprocess.Popen,
    watch: Watch,
    moment: Moment | None,
    *,
    times: int,
    delay: float,
    patience: float,
    grace: float,
) -> Ended:
    """Wait for a moment's event to happen ``times`` times and ``delay`` more, and kill.

    Raises:
      RunError: the process did not end within ``patience`` seconds, or ``grace`` after a SIGTERM.
    """
    began = time.monotonic()
    awake, last = 0.0, began

    def wait(until: Callable[[], bool], limit: float, why: str) -> bool:
        """Return whether it happened while the process was there."""
        nonlocal awake, last
        limit += awake
        while not until():
            if process.poll() is not None:
                return False
            # A machine that slept, or two processes that were both stopped, are no run that hangs.
            now = time.monotonic()
            awake, last = awake + min(now - last, 0.2), now
            if awake > limit:
                raise RunError(why)
            time.sleep(_POLL)
        return process.poll() is None

    def happened() -> bool:
        watch.look()
        assert moment is not None and moment.event is not None
        return watch.counts[moment.event] >= times

    hangs = f"the run did not go on for {patience:.0f} seconds: it hangs"
    if moment is None or (moment.event and not wait(happened, patience, hangs)):
        wait(lambda: False, patience, hangs)
        return Ended(process.returncode, time.monotonic() - began, False)
    due = time.monotonic() + delay
    if not wait(lambda: time.monotonic() >= due, patience, hangs):
        return Ended(process.returncode, time.monotonic() - began, False)
    sent = time.monotonic() - began
    process.send_signal(moment.signal)
    name = signal.Signals(moment.signal).name
    wait(lambda: False, grace, f"the run did not end within {grace:.0f} seconds after {name}")
    return Ended(process.returncode, sent, True)
