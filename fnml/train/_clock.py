"""Time for a run: how fast it goes, and what does not count."""

import time


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
        return time.perf_counter() - self._began

    def start(self, step: int) -> None:
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

    def paused(self) -> "Pause":
        return Pause(self)

    def exclude(self, seconds: float) -> None:
        self._excluded += seconds

    def timing(self, step: int, samples: int, waited: float, before: float) -> dict[str, float]:
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


class Pause:
    def __init__(self, clock: Clock):
        self._clock = clock

    def __enter__(self) -> None:
        self._from = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._clock.exclude(time.perf_counter() - self._from)
