"""A line of a run's record, and whoever writes it down."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol


@dataclass(frozen=True)
class Row:
    """What is known about a run after some step, as host numbers.

    Attributes:
      step: the number of steps done.
      kind: ``"train"`` for means over the steps since the row before, ``"eval"`` for an
        evaluation at this step.
      values: metrics by name, such as ``loss`` and ``accuracy``. Equal runs have equal values.
      timing: measurements by name, such as ``steps_per_second``; these differ between runs.
    """

    step: int
    kind: Literal["train", "eval"]
    values: Mapping[str, float]
    timing: Mapping[str, float] = field(default_factory=dict)


class Sink(Protocol):
    """Where rows go. Several sinks serve one run; each gets every row once, in order."""

    def write(self, row: Row) -> None:
        """Take one row; it may be kept in memory until :meth:`flush`."""

    def flush(self) -> None:
        """Make everything written so far durable or visible; called at every checkpoint."""

    def close(self) -> None:
        """Flush and release files, threads and sockets; called once."""
