"""Find a process that no longer gets on."""

import signal
from collections.abc import Sequence
from typing import NamedTuple

_MET = 2


class Seen(NamedTuple):
    """A process as its launcher sees it.

    Attributes:
      process: which one it is.
      arrived: 1 once it calls the coordinator, 2 once it has met all the others, 0 before.
      step: the last step it has told of, -1 before the first.
      idle: seconds since its last sign of life, or since its start.
      frozen: whether the system has stopped it (SIGSTOP, or a debugger).
      code: its exit code, ``None`` while it runs; below 0 the signal that ended it.
    """

    process: int
    arrived: int
    step: int
    idle: float
    frozen: bool
    code: int | None


class Patience(NamedTuple):
    """How long a process may show no sign of life, in seconds.

    Attributes:
      start: until it has met the others.
      first: from there until its first step is done: it reads data, restores, and compiles.
      step: from then on.
    """

    start: float
    first: float
    step: float


def stuck(seen: Sequence[Seen], patience: Patience, coordinator: str) -> str | None:
    """Say in a sentence which process has been without a sign of life for too long, and where.

    Processes wait for each other, so one that is stuck takes the others along; the one to blame is
    the one that the system has stopped, or else the one that is furthest behind.

    >>> seen = [Seen(0, 2, 41, 9.0, False, None), Seen(1, 2, 40, 9.5, True, None)]
    >>> stuck(seen, Patience(300, 1800, 8), "node1:8476")
    'process 1 has shown no sign of life for 9.5 s after step 40 (it is stopped: state T)'
    """
    alive = [one for one in seen if one.code is None]
    # The least advanced sets the pace: who is ahead of it waits.
    meeting = any(one.arrived < _MET for one in alive)
    limit = patience.first if any(one.step < 0 for one in alive) else patience.step
    if all(one.idle <= (patience.start if meeting else limit) for one in alive):
        return None
    if meeting:
        here = ", ".join(str(one.process) for one in seen if one.arrived) or "none"
        missing = ", ".join(str(one.process) for one in alive if not one.arrived)
        if not missing:
            return (
                f"all processes call the coordinator {coordinator}, but did not get through to it, "
                f"or to each other, within {patience.start:g} s{_state(alive)}"
            )
        return (
            f"process {missing} has not arrived at the coordinator {coordinator} within "
            f"{patience.start:g} s (arrived: {here}){_state(alive)}"
        )
    one = min(alive, key=lambda one: (not one.frozen, one.step, -one.idle))
    # A stopped one stays as it is: it is named when it has itself been silent for so long.
    if one.frozen and one.idle <= limit:
        return None
    where = f"after step {one.step}" if one.step >= 0 else "before its first step"
    frozen = " (it is stopped: state T)" if one.frozen else ""
    return f"process {one.process} has shown no sign of life for {one.idle:.1f} s {where}{frozen}"


def _state(alive: Sequence[Seen]) -> str:
    frozen = ", ".join(str(one.process) for one in alive if one.frozen)
    return f"; stopped (state T): {frozen}" if frozen else ""


def how_ended(code: int) -> str:
    """Say what an exit code means.

    >>> how_ended(-9)
    'was ended by SIGKILL'
    """
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
