"""When something is due: every so many steps, or minutes."""

from dataclasses import dataclass

from fnml.core import ConfigError


@dataclass(frozen=True)
class Every:
    """Say how often something happens, in steps or in minutes; either makes it due.

    By steps it is due after every step divisible by ``steps``, whenever the run started, so a
    resumed run keeps the rhythm. By minutes it is due that long after the last time.

    Args:
      steps: a number of steps, or ``None``.
      minutes: a number of minutes of wall time, or ``None``.

    Raises:
      ConfigError: neither is given, or one is not positive.

    >>> Every(steps=100).next_step(250)
    300
    """

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ConfigError("Every needs steps=..., minutes=... or both")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"Every(steps=...) counts at least 1 step, got {self.steps}")
        if self.minutes is not None and not self.minutes > 0:
            raise ConfigError(f"Every(minutes=...) is a positive time, got {self.minutes}")

    def next_step(self, step: int) -> int | None:
        """Return the first step after ``step`` at which this is due by steps."""
        return None if self.steps is None else (step // self.steps + 1) * self.steps

    def due(self, step: int, seconds: float) -> bool:
        """Tell whether this is due after ``step``, ``seconds`` after it last happened."""
        by_steps = self.steps is not None and step % self.steps == 0
        return by_steps or self.overdue(seconds)

    def overdue(self, seconds: float) -> bool:
        """Tell whether this is due by the clock, ``seconds`` after it last happened."""
        return self.minutes is not None and seconds >= 60 * self.minutes
