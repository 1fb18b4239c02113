"""A clock that stands still while its owner does."""

import time

_LONGEST = 1.0  # seconds between two looks of a process that is awake


class Awake:
    """Count the seconds in which this process was running.

    A launcher that was stopped for a minute, with all that it watches, has not seen a minute of
    silence. It looks at its clock many times a second, so a longer gap is one of its own.

    >>> clock = Awake()
    >>> clock.now() < 1
    True
    """

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._total = 0.0

    def now(self) -> float:
        """Return the seconds since the clock was made, without the gaps."""
        now = time.monotonic()
        self._total += min(now - self._last, _LONGEST)
        self._last = now
        return self._total
