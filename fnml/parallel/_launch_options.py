"""The options of a launcher."""

from dataclasses import dataclass

from fnml.core import ConfigError


@dataclass(frozen=True)
class Launch:
    """Start a command in several processes that train together, and watch over them.

    Raises:
      ConfigError: a value is out of range; all of them are listed.
    """

    processes: int = 1
    """Processes on this host."""
    hosts: int = 1
    """Hosts in all, each with a launcher of its own."""
    host: int = 0
    """Which of them this is; number 0 leads."""
    coordinator: str = ""
    """host:port of host 0, where its launcher takes the others' calls."""
    restarts: int = 3
    """How often to start all again after one was lost."""
    pause: float = 1.0
    """Seconds before a restart; doubled each time that no checkpoint was saved in between."""
    elastic: int = 0
    """Go on with fewer processes, but at least so many; 0 waits until all can be there again."""
    watchdog: float = 300.0
    """Seconds without a step, a save or a held-out batch after which a process counts as stuck."""
    first_step: float = 1800.0
    """The same until the first step is done: data are read and the step is compiled."""
    start_timeout: int = 300
    """Seconds within which processes have to meet, and hosts to call."""
    heartbeat: float = 5.0
    """Seconds of silence between launchers after which a host counts as lost."""
    grace: float = 10.0
    """Seconds between TERM and KILL for what is left of a failed attempt."""

    def __post_init__(self) -> None:
        least = {"processes": 1, "hosts": 1, "host": 0, "restarts": 0, "elastic": 0, "pause": 0}
        above = ("watchdog", "first_step", "start_timeout", "heartbeat")
        faults = [
            f"{name}={getattr(self, name)}: expected at least {low}"
            for name, low in least.items()
            if getattr(self, name) < low
        ]
        faults += [
            f"{name}={getattr(self, name)}: expected more than 0"
            for name in above
            if not getattr(self, name) > 0
        ]
        if not self.grace >= 0:
            faults.append(f"grace={self.grace}: expected at least 0")
        if not 0 <= self.host < max(self.hosts, 1):
            faults.append(
                f"host={self.host}: expected 0 to {self.hosts - 1}, as hosts={self.hosts}"
            )
        name, _, port = self.coordinator.rpartition(":")
        if self.hosts > 1 and not (name and port.isdecimal() and 0 < int(port) < 65536):
            faults.append(
                f"coordinator={self.coordinator!r}: expected host:port of host 0, such as "
                "node1:8476"
            )
        if faults:
            raise ConfigError("; ".join(faults))

    @property
    def address(self) -> tuple[str, int]:
        """Where host 0's launcher listens."""
        name, _, port = self.coordinator.rpartition(":")
        return name.strip("[]"), int(port)
