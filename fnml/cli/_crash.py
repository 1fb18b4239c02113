"""Kill a recipe's run again and again, and compare what becomes of it with an uninterrupted run."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fnml.checkpoint import restore, tree_sha256, verify
from fnml.cli._crash_watch import MOMENTS, Ended, Moment, Spans, Watch, kill_at, watch_to_end
from fnml.core import CheckpointError, DataError, RunError
from fnml.recipes import read_record, read_result, verify_run
from fnml.sinks import read_jsonl

_COLD = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
_SAME = ("recipe", "step", "stopped", "train", "eval", "params_sha256")
_TRIES = 3


class Kill(NamedTuple):
    """One kill: when, what it left behind, and from where the run went on.

    Attributes:
      number: counted from 1, over all runs.
      run: which of the killed runs, from 1.
      moment: what was aimed at.
      seconds: how long after the process began.
      found: what was on disk afterwards.
      step: the checkpoint that the run goes on from; 0 for the beginning.
      state: ``"same"`` or ``"differs"`` from the uninterrupted run's state of that step, or
        ``"-"`` where that run has none.
      faults: what should not be.
    """

    number: int
    run: int
    moment: str
    seconds: float
    found: str
    step: int
    state: str
    faults: tuple[str, ...]


@dataclass
class Report:
    """What came of the kills.

    Attributes:
      params_sha256: of the uninterrupted run's final parameters.
      kills: every kill.
      runs: for each killed run the faults of its end; an empty list means that it ended with the
        same bits, rows and record.
      unseen: moments that no process came by.
    """

    params_sha256: str
    kills: list[Kill] = field(default_factory=list)
    runs: list[list[str]] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not any(self.runs) and not any(kill.faults for kill in self.kills)


class Reference:
    """The uninterrupted run that every killed one has to end as."""

    def __init__(self, directory: Path, spans: Spans) -> None:
        self.directory, self.spans = directory, spans
        self.steps = verify(directory / "checkpoints")
        self.rows, self.table = rows(directory), table(directory)
        self.result = read_result(directory) or {}
        self.batch = int(read_record(directory)["config"]["run"]["batch_size"])
        self._hashes: dict[int, str] = {}

    def state_sha256(self, step: int) -> str | None:
        """Hash the state of a step, if there is a checkpoint of it."""
        if step not in self.steps:
            return None
        if step not in self._hashes:
            found = restore(self.directory / "checkpoints", step=step)
            self._hashes[step] = tree_sha256(found.state)
        return self._hashes[step]


def crash(
    recipe: str,
    options: Sequence[str],
    root: Path,
    *,
    kills: int,
    seed: int,
    grace: float = 60.0,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Train a recipe once without interruption, then again while killing it.

    Args:
      recipe: its name.
      options: what ``fnml train RECIPE`` takes.
      root: an empty directory for the runs; every checkpoint of the uninterrupted run is kept.
      kills: how many processes to kill; runs that finish before are followed by others.
      seed: decides the instants, as far as a clock can.
      grace: seconds within which a process has to end after SIGTERM.
      say: takes one line for each kill.

    Raises:
      RunError: the recipe does not train even without being killed, or hangs.
    """
    say("the uninterrupted run")
    whole = root / "whole"
    reference = _uninterrupted(recipe, options, whole)
    report = Report(reference.result["params_sha256"])
    rng = np.random.default_rng(seed)
    plan, missed = _cycle(report.unseen), dict.fromkeys(MOMENTS, 0)
    moment: Moment | None = next(plan)
    last = int(reference.result["step"])
    while len(report.kills) < kills:
        directory = root / f"killed-{len(report.runs) + 1}"
        while True:
            aim = moment if len(report.kills) < kills else None
            ended = _attempt(recipe, options, directory, aim, reference, rng, grace, last)
            if ended.killed and aim is not None:
                report.kills.append(_examine(directory, aim, ended, report, reference))
                say(describe(report.kills[-1]))
                moment = next(plan)
            elif aim is not None and aim.event:
                missed[aim] += 1
                if missed[aim] % _TRIES == 0:
                    if all(kill.moment != aim.name for kill in report.kills):
                        report.unseen.append(aim.name)
                    moment = next(plan)
            finished = (directory / "result.json").exists()
            if not ended.killed and not finished:
                raise RunError(f"the run ended with {ended.code}:\n{_log(directory)}")
            if finished:
                break
        report.runs.append(_differences(directory, reference))
        say(f"run {len(report.runs)}: " + ("; ".join(report.runs[-1]) or "the same bits"))
    return report


def describe(kill: Kill) -> str:
    """Tell of a kill in a line."""
    faults = f"  FAULT: {'; '.join(kill.faults)}" if kill.faults else ""
    return (
        f"kill {kill.number:>3}  {kill.moment:<29} {kill.seconds:6.2f} s  step {kill.step:<6} "
        f"{kill.found}{faults}"
    )


def _cycle(unseen: list[str]) -> Iterator[Moment]:
    while True:
        yield from (moment for moment in MOMENTS if moment.name not in unseen)


def _command(recipe: str, options: Sequence[str], directory: Path) -> list[str]:
    if not (directory / "config.json").exists():
        # Killed before there was a run at all: nothing is there to be taken up.
        shutil.rmtree(directory, ignore_errors=True)
        return ["train", recipe, *options, "--quiet", "--out", str(directory)]
    return ["resume", str(directory)]


def _spawn(arguments: Sequence[str], directory: Path, *, cold: bool) -> subprocess.Popen:
    with directory.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "fnml", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(_COLD if cold else {})},
        )


def _log(directory: Path) -> str:
    return directory.with_suffix(".log").read_text(errors="replace")[-4000:].strip()


def _uninterrupted(recipe: str, options: Sequence[str], directory: Path) -> Reference:
    # All checkpoints stay, so that what a killed run goes on from has something to be compared to.
    every = ["--keep-last", "1000000000"]
    command = _command(recipe, [*options, *every], directory)
    with _spawn(command, directory, cold=True) as process:
        try:
            spans = watch_to_end(process, Watch(directory, process.pid, -1))
        finally:
            process.kill()
    if process.returncode:
        raise RunError(f"the recipe does not train even without being killed:\n{_log(directory)}")
    return Reference(directory, spans)


def _attempt(
    recipe: str,
    options: Sequence[str],
    directory: Path,
    moment: Moment | None,
    reference: Reference,
    rng: np.random.Generator,
    grace: float,
    last: int,
) -> Ended:
    spans = reference.spans
    span = getattr(spans, moment.span) if moment and moment.span else 0.001
    command = _command(recipe, options, directory)
    once = moment is None or moment.event in (None, "locked", "last")
    times = 1 if once else int(rng.integers(1, 3))
    with _spawn(command, directory, cold=bool(moment and moment.cold)) as process:
        try:
            return kill_at(
                process,
                Watch(directory, process.pid, last),
                moment,
                times=times,
                delay=float(rng.uniform(0, span)),
                patience=60 + 10 * spans.whole,
                grace=grace,
            )
        finally:
            process.kill()


def _examine(
    directory: Path, moment: Moment, ended: Ended, report: Report, reference: Reference
) -> Kill:
    """Look at what a killed process left, before the next one goes on from it."""
    faults = []
    if moment.signal == signal.SIGTERM:
        # Before the loop has begun, SIGTERM ends a process as it ends any.
        if ended.code not in (143, 0, -signal.SIGTERM):
            faults.append(f"exit code {ended.code} after SIGTERM: {_log(directory)}")
    elif ended.code != -signal.SIGKILL:
        faults.append(f"exit code {ended.code}: {_log(directory)}")
    step, state = 0, "-"
    checkpoints = directory / "checkpoints"
    found = verify(checkpoints) if checkpoints.is_dir() else {}
    faults += [str(fault) for damage in found.values() for fault in damage]
    if found and not faults:
        try:
            step, arrays, meta = restore(checkpoints)
        except CheckpointError as error:
            faults.append(str(error))
        else:
            expected = reference.state_sha256(step)
            if expected is not None:
                state = "same" if tree_sha256(arrays) == expected else "differs"
            if state == "differs":
                faults.append(f"the state of step {step} has other bits")
            position = meta.get("data", {}).get("position", step * reference.batch)
            if position != step * reference.batch:
                faults.append(f"{position} examples are counted after step {step}")
    faults += _row_faults(directory, reference, step)
    return Kill(
        len(report.kills) + 1,
        len(report.runs) + 1,
        moment.name,
        ended.seconds,
        _what_is_there(directory, step),
        step,
        state,
        tuple(faults),
    )


def _what_is_there(directory: Path, step: int) -> str:
    if not (directory / "config.json").exists():
        return "no run yet"
    if (directory / "result.json").exists():
        return "finished"
    parts = []
    checkpoints = directory / "checkpoints"
    for entry in sorted(checkpoints.glob(".tmp-*")) if checkpoints.is_dir() else ():
        at = int(entry.name.split("-")[1])
        if at < step:
            parts.append(f"step {at} half deleted")
        elif (entry / "manifest.json").exists():
            parts.append(f"step {at} with a manifest, not renamed")
        else:
            parts.append(f"step {at} half written")
    try:
        ahead = max((at for at, _, _ in rows(directory)), default=0)
    except DataError:
        ahead = 0
    if ahead > step:
        parts.append(f"rows to step {ahead}")
    return ", ".join(parts) or ("nothing torn" if step else "nothing saved yet")


def _row_faults(directory: Path, reference: Reference, step: int) -> list[str]:
    """Rows are a beginning of the uninterrupted run's, with none missing up to the checkpoint."""
    faults = []
    for name, read, expected in (
        ("metrics.jsonl", rows, reference.rows),
        ("metrics.csv", table, reference.table),
    ):
        try:
            got = read(directory)
        except DataError as error:
            faults.append(str(error))
            continue
        if got != expected[: len(got)]:
            faults.append(f"{name} has other rows")
        due = sum(
            int(row[0] if isinstance(row, tuple) else row["step"]) <= step for row in expected
        )
        if step and len(got) < due:
            faults.append(f"{name} lacks rows up to step {step}: {len(got)} of {due}")
    return faults


def _differences(directory: Path, reference: Reference) -> list[str]:
    """List what differs between a killed run's end and the uninterrupted one's."""
    result = read_result(directory) or {}
    faults = [
        f"{name} is {result.get(name)!r}, expected {reference.result.get(name)!r}"
        for name in _SAME
        if repr(result.get(name)) != repr(reference.result.get(name))
    ]
    if rows(directory) != reference.rows:
        faults.append("metrics.jsonl has other rows")
    if table(directory) != reference.table:
        faults.append("metrics.csv has other rows")
    faults += [f"{finding.where}: {finding.problem}" for finding in verify_run(directory).findings]
    left = [path.name for path in directory.rglob(".*tmp*")]
    if left:
        faults.append(f"left behind: {', '.join(sorted(left))}")
    return faults


def rows(directory: Path) -> list[tuple[int, str, dict[str, str]]]:
    """Return the rows of ``metrics.jsonl`` without their timing."""
    path = directory / "metrics.jsonl"
    found = read_jsonl(path) if path.exists() else []
    # As text: a NaN is not equal to itself.
    return [
        (row.step, row.kind, {name: repr(value) for name, value in row.values.items()})
        for row in found
    ]


def table(directory: Path) -> list[dict[str, Any]]:
    """Return the whole lines of ``metrics.csv`` without timing and empty cells."""
    path = directory / "metrics.csv"
    if not path.exists():
        return []
    data = path.read_bytes()
    lines = data[: data.rfind(b"\n") + 1].decode().splitlines()
    return [
        {name: cell for name, cell in row.items() if cell and not name.startswith("time/")}
        for row in csv.DictReader(lines)
    ]
