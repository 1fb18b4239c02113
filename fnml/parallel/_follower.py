"""Follow the launcher of host 0."""

import contextlib
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence

from fnml.core import RunError
from fnml.parallel._awake import Awake
from fnml.parallel._hosts import Here, Order
from fnml.parallel._launch_options import Launch
from fnml.parallel._link import Link, connect
from fnml.parallel._ranks import Ranks

_TICK = 0.05


def follow(
    launch: Launch,
    program: Sequence[str],
    fnml: bool,
    ranks: Ranks,
    signals: Callable[[], Sequence[int]],
) -> int:
    """Do what host 0's launcher says until it says that all is over; return its exit code.

    Where the line is cut, this host's processes are ended, so that none of them trains on beside
    those that host 0 starts again, and host 0 is called anew.

    Raises:
      RunError: host 0 does not answer, or will not have this host.
    """
    here = Here(launch.host, socket.gethostname(), launch.processes, ranks, program, fnml)
    while True:
        link = _call(launch, here, program, signals)
        if link is None:
            return 128 + signals()[0]
        with contextlib.closing(link):
            code = _serve(launch, here, link, signals)
        _end(here, ranks, launch.grace)
        if code is not None:
            return code
        if signals():
            return 128 + signals()[0]
        _tell(f"host 0 is lost: {link.lost}. This host's processes are ended; calling it again")


def _call(
    launch: Launch, here: Here, program: Sequence[str], signals: Callable[[], Sequence[int]]
) -> Link | None:
    """Call host 0 until it answers; ``None`` if a signal came before."""
    clock, reason = Awake(), "no answer"
    while clock.now() < launch.start_timeout and not signals():
        try:
            link = connect(launch.address, launch.heartbeat, min(5, launch.start_timeout))
        except OSError as error:
            reason = str(error)
            time.sleep(0.2)
            continue
        hello = {"host": here.index, "name": here.name, "processes": here.processes}
        link.send({**hello, "program": [*program]})
        answer = link.receive(launch.heartbeat) or {}
        if "welcome" in answer:
            _tell(f"host {here.index} follows host 0 at {launch.coordinator}")
            return link
        link.close()
        if "refused" in answer:
            raise RunError(f"host 0 at {launch.coordinator} refuses: {answer['refused']}")
        reason = str(link.lost)
        time.sleep(0.2)
    if signals():
        return None
    raise RunError(
        f"the launcher of host 0 did not answer at {launch.coordinator} within "
        f"{launch.start_timeout} s: {reason}. Look whether it runs there, with --hosts "
        f"{launch.hosts}, and whether this host reaches that address (name, port, firewall)"
    )


def _serve(
    launch: Launch, here: Here, link: Link, signals: Callable[[], Sequence[int]]
) -> int | None:
    """Obey until the line is cut (``None``), or all is over (the exit code)."""
    clock, attempt, told, said, sent = Awake(), 0, 0.0, None, 0
    while True:
        lost = link.lost  # asked first: the last word may have come before the end of the line
        while message := link.receive():
            if "start" in message:
                attempt = message["attempt"]
                here.start(Order(message["start"]))
            elif "signal" in message:
                here.send(message["signal"])
            elif "end" in message:
                return int(message["end"])
        if lost:
            return None
        for number in signals()[sent:]:
            # The processes agree with all others on where to stop; host 0 sees them end.
            here.send(number if not sent else signal.SIGKILL)
            sent += 1
        seen, now = here.seen(), clock.now()
        codes = [one.code for one in seen]
        if codes != said or now - told > min(launch.heartbeat / 4, 0.5):
            said, told = codes, now
            link.send({"attempt": attempt, "seen": seen})
        time.sleep(_TICK)


def _end(here: Here, ranks: Ranks, grace: float) -> None:
    """End this host's processes: TERM, a while, KILL."""
    clock = Awake()
    here.send(signal.SIGTERM)
    while any(one.code is None for one in here.seen()) and clock.now() < grace:
        time.sleep(_TICK)
    ranks.end()


def _tell(text: str) -> None:
    print(f"fnml launch: {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
