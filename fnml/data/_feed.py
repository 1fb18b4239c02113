"""Prepare what comes next while the device works: in a thread, once that pays."""

import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from fnml.core import DataError

_EXIT_PATIENCE = 10.0
# Below this a thread costs more than it hides: it takes turns with the consumer's Python.
_WORTH_A_THREAD = 5e-4


class _Channel:
    """What the thread and the consumer share: a bounded queue of groups, and how it ended."""

    def __init__(self, depth: int) -> None:
        # Condition's lock is reentrant: the collector may close a feed in any thread, anywhere.
        self.changed = threading.Condition()
        self.groups: deque[Sequence[Any]] = deque()
        self.depth = depth
        self.closed = False
        self.finished = False
        self.error: BaseException | None = None

    def room(self) -> bool:
        """Wait until another group may be prepared; False once the consumer has left."""
        with self.changed:
            while len(self.groups) >= self.depth and not self.closed:
                self.changed.wait()
            return not self.closed

    def put(self, group: Sequence[Any]) -> None:
        with self.changed:
            self.groups.append(group)
            self.changed.notify()

    def finish(self, error: BaseException | None) -> None:
        with self.changed:
            self.finished, self.error = True, error
            self.changed.notify()

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.groups.clear()
            self.changed.notify_all()


def _produce(groups: Iterator[Sequence[Any]], channel: _Channel) -> None:
    """Run in the thread: pull groups one by one, for as long as there is room."""
    error: BaseException | None = None
    try:
        while channel.room():
            group = next(groups, None)
            if group is None:
                break
            channel.put(group)
    except BaseException as caught:  # noqa: BLE001 (the consumer raises it)
        error = caught
    channel.finish(error)


def _stop(channel: _Channel, thread: threading.Thread, patience: float | None) -> None:
    channel.close()
    if thread.is_alive() and thread is not threading.current_thread():
        thread.join(patience)


class Feed:
    """An iterator whose elements are prepared ahead by a thread.

    The thread pulls *groups* of elements, so that small elements cost the consumer one
    ``popleft`` and no lock. It is at most ``depth`` groups ahead of the consumer's.

    Use it as a context manager, or call :meth:`close`; a feed that is garbage collected, or
    alive at the interpreter's exit, closes too. One thread may consume it.

    Law: the elements do not depend on ``depth`` or ``threaded``.

    Args:
      groups: yields sequences of elements; it runs in the thread.
      depth: the number of groups to prepare ahead.
      threaded: ``False`` prepares each group when it is asked for; ``None`` begins so, and starts
        the thread once an element (the first group aside) took longer than half a millisecond.
        A compiled call returns before the device is done, so quick elements are prepared while
        it works in any case.

    Attributes:
      waited: seconds that the consumer was blocked because nothing was ready.

    Raises:
      DataError: ``depth`` is below 1.
      Exception: whatever ``groups`` raises is raised by ``next``, after the elements before it.

    >>> with Feed(iter([[1, 2], [3]]), depth=1) as feed:
    ...     list(feed)
    [1, 2, 3]
    """

    def __init__(
        self,
        groups: Iterator[Sequence[Any]],
        depth: int = 2,
        threaded: bool | None = True,
    ) -> None:
        if depth < 1:
            raise DataError(f"the feed's depth is {depth}: it has to be at least 1")
        self.waited = 0.0
        self._ready: deque[Any] = deque()
        self._channel = _Channel(depth)
        self._ended = False
        self._groups = groups
        self._may_start = threaded is None
        self._warm = False
        # The thread must not refer to the feed, or the feed could never be collected.
        self._thread = threading.Thread(
            target=_produce, args=(groups, self._channel), name="fnml-feed", daemon=True
        )
        self._started = False
        # A daemon thread inside the runtime while the interpreter dies can crash the process.
        self._finalizer = weakref.finalize(self, _stop, self._channel, self._thread, _EXIT_PATIENCE)
        if threaded:
            self._start()

    def _start(self) -> None:
        self._started = True
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        ready = self._ready
        while not ready:
            ready.extend(self._next_group())
        return ready.popleft()

    def _next_group(self) -> Sequence[Any]:
        return self._take() if self._started else self._prepare()

    def _prepare(self) -> Sequence[Any]:
        if self._ended:
            raise StopIteration
        began = time.perf_counter()
        try:
            group = next(self._groups)
        except BaseException:
            self.close()
            raise
        seconds = time.perf_counter() - began
        self.waited += seconds
        slow = seconds > _WORTH_A_THREAD * max(1, len(group))
        if slow and self._warm and self._may_start:
            self._start()
        self._warm = True
        return group

    def _take(self) -> Sequence[Any]:
        channel = self._channel
        with channel.changed:
            if not channel.groups and not channel.finished and not self._ended:
                began = time.perf_counter()
                while not channel.groups and not channel.finished:
                    channel.changed.wait()
                self.waited += time.perf_counter() - began
            if channel.groups and not self._ended:
                group = channel.groups.popleft()
                channel.changed.notify()
                return group
            error, channel.error = channel.error, None
        self.close()
        if error is not None:
            raise error
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for the gather that it is in; elements left are dropped."""
        self._ended = True
        self._ready.clear()
        self._finalizer.detach()
        _stop(self._channel, self._thread, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
