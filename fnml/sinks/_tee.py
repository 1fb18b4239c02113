"""Serve several sinks, and survive the failure of some."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from fnml.core import Row, Sink

_LIMIT = 10_000


class _Guard:
    """One sink, and the rows that it could not take yet."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._waiting: deque[Row] = deque(maxlen=_LIMIT)
        self._failing = False

    def _attempt(self, action: Callable[[], None]) -> None:
        log = logging.getLogger(__name__)
        try:
            action()
        except OSError as error:
            if not self._failing:
                log.warning(
                    "the metric sink %r failed (%s): the run goes on, and up to %d rows wait "
                    "until it works again",
                    self._sink,
                    error,
                    _LIMIT,
                )
            self._failing = True
        else:
            if self._failing:
                log.info("the metric sink %r works again", self._sink)
            self._failing = False

    def _drain(self) -> None:
        while self._waiting:
            row = self._waiting.popleft()
            try:
                self._sink.write(row)
            except OSError:
                self._waiting.appendleft(row)
                raise

    def _drain_and_flush(self) -> None:
        self._drain()
        self._sink.flush()

    def write(self, row: Row) -> None:
        self._waiting.append(row)
        self._attempt(self._drain)

    def flush(self) -> None:
        self._attempt(self._drain_and_flush)

    def close(self) -> None:
        self._attempt(self._drain)
        if self._waiting:
            logging.getLogger(__name__).warning(
                "the metric sink %r never took its last %d rows", self._sink, len(self._waiting)
            )
            self._waiting.clear()
        self._attempt(self._sink.close)


class _Tee:
    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)
        self._guards = [_Guard(sink) for sink in sinks]

    def __repr__(self) -> str:
        return f"tee({self._sinks})"

    def write(self, row: Row) -> None:
        for guard in self._guards:
            guard.write(row)

    def flush(self) -> None:
        for guard in self._guards:
            guard.flush()

    def close(self) -> None:
        with ExitStack() as stack:
            for guard in reversed(self._guards):
                stack.callback(guard.close)


def tee(sinks: Sequence[Sink]) -> Sink:
    """Return one sink that passes everything on to each of ``sinks``, in order.

    A full disk or a closed terminal must not end a week-long run: when a sink raises ``OSError``,
    a warning is logged once, the others go on, and its rows wait (the newest 10,000) until it
    takes them again. Any other exception is a fault of the program and propagates. :meth:`close`
    closes every sink, even if one of them raises.

    Law: a sink that fails for a while gets every row once and in order, as the others do.

    >>> class Print:
    ...     def write(self, row): print(row.step)
    ...     def flush(self): pass
    ...     def close(self): print("closed")
    >>> both = tee([Print(), Print()])
    >>> both.write(Row(3, "train", {}))
    3
    3
    >>> both.close()
    closed
    closed
    """
    return _Tee(sinks)
