"""Time for a run: how fast it goes, and what does not count."""

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Measure speed, leaving out compilation, evaluation and saving."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._mark = self._began
        self._excluded = 0.0
        self._compile = 0.0
        self._step = 0
        self._waited = 0.0

    def now(self) -> float:
        """Return the seconds since the clock was made."""
        return time.perf_counter() - self._began

    def start(self, step: int) -> None:
        """Begin to measure, at a step."""
        self._step = step
        self._mark = time.perf_counter()

    def compiled(self) -> int:
        """Take what has passed since :meth:`start` as the time of the first compilation."""
        self._compile = time.perf_counter() - self._mark
        self._excluded += self._compile
        return 1

    @property
    def compile_seconds(self) -> float:
        """The time of the first compilation."""
        return self._compile

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is done inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.exclude(time.perf_counter() - began)

    def exclude(self, seconds: float) -> None:
        """Leave out some of the time since the last row."""
        self._excluded += seconds

    def timing(self, step: int, samples: int, waited: float, before: float) -> dict[str, float]:
        """Return a row's columns of time, and begin the next row."""
        now = time.perf_counter()
        seconds = max(now - self._mark - self._excluded, 1e-9)
        speed = (step - self._step) / seconds
        wait = min(max((waited - self._waited) / seconds, 0.0), 1.0)
        self._mark, self._step, self._waited, self._excluded = now, step, waited, 0.0
        return {
            "steps_per_second": speed,
            "samples_per_second": speed * samples,
            "data_wait": wait,
            "compile_seconds": self._compile,
            "seconds": now - self._began + before,
        }
