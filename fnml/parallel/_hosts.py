"""The hosts of a run, as the launcher that leads sees them."""

from collections.abc import Sequence
from typing import Any, Protocol

from fnml.parallel._initialize import Place
from fnml.parallel._link import Link
from fnml.parallel._ranks import Ranks
from fnml.parallel._watchdog import Seen


class Order(dict[str, Any]):
    """What a host is told to start.

    ``first`` and ``here``: which processes are its; ``count``: how many there are; ``coordinator``
    and ``bind``; ``resume``: the run's directory and number of devices, or ``None`` to start as the
    command line says; ``timeout``.
    """

    def places(self, ranks: Ranks) -> list[Place]:
        """Return the places of the host's processes."""
        here = self["here"]
        return [
            Place(
                self["first"] + i,
                self["count"],
                self["coordinator"],
                self["bind"],
                (i, here),
                None,
                ranks.directory,
                self["timeout"],
            )
            for i in range(here)
        ]

    def command(self, program: Sequence[str], fnml: bool) -> list[str]:
        """Return the command line: the one given, or one that resumes its run."""
        resume = self["resume"]
        if not fnml or resume is None:
            return [*program]
        again = ["resume", resume["directory"], "--devices", str(resume["devices"])]
        return [*program[:_PROGRAM], *again]


_PROGRAM = 3  # python -m fnml


class Host(Protocol):
    """A host with a launcher, this one or another."""

    index: int
    name: str
    processes: int

    def start(self, order: Order) -> None:
        """Start processes."""

    def seen(self) -> Sequence[Seen] | None:
        """Return how the processes are; ``None`` before anything is known of them."""

    def send(self, number: int) -> None:
        """Send a signal to the processes."""

    @property
    def lost(self) -> str | None:
        """Why the host can no longer be spoken to."""


class Here:
    """This host."""

    lost = None

    def __init__(
        self,
        index: int,
        name: str,
        processes: int,
        ranks: Ranks,
        program: Sequence[str],
        fnml: bool,
    ) -> None:
        self.index, self.name, self.processes = index, name, processes
        self._ranks, self._program, self._fnml = ranks, program, fnml

    def start(self, order: Order) -> None:
        """Start processes; see :class:`Host`."""
        self._ranks.start(order.command(self._program, self._fnml), order.places(self._ranks))

    def seen(self) -> list[Seen]:
        """Return how the processes are."""
        return self._ranks.seen()

    def send(self, number: int) -> None:
        """Send a signal to the processes."""
        self._ranks.send(number)


class There:
    """Another host, at the other end of a link."""

    def __init__(self, index: int, name: str, processes: int, link: Link) -> None:
        self.index, self.name, self.processes = index, name, processes
        self.link = link
        self._attempt = 0
        self._seen: list[Seen] | None = None

    def start(self, order: Order) -> None:
        """Have processes started; see :class:`Host`."""
        self._attempt, self._seen = self._attempt + 1, None
        self.link.send({"start": {**order}, "attempt": self._attempt})

    def seen(self) -> list[Seen] | None:
        """Return what the host last said of its processes."""
        while message := self.link.receive():
            # Of processes before these it may still have been on the way.
            if message.get("attempt") == self._attempt:
                self._seen = [Seen(*one) for one in message["seen"]]
        return self._seen

    def send(self, number: int) -> None:
        """Have a signal sent to the processes."""
        self.link.send({"signal": number})

    @property
    def lost(self) -> str | None:
        """Why the host can no longer be spoken to."""
        return self.link.lost
