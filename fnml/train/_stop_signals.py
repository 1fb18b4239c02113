"""Turn Ctrl-C and SIGTERM into a clean stop."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], str | None]]:
    """Catch the first SIGINT or SIGTERM; yield a function that names it, or returns ``None``.

    The first signal asks for a stop at the next step boundary. A second Ctrl-C interrupts at once,
    as usual. The handlers that were there before are put back at the end. Outside the main thread,
    where Python allows no handlers, nothing is caught.

    >>> with stop_on_signals() as stopped:
    ...     stopped() is None
    True
    """
    caught: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and caught:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: caught[0] if caught else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
