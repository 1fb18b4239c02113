"""The line between two launchers: JSON objects, one to a line, and a beat that says it holds."""

import contextlib
import json
import queue
import socket
import threading
from typing import Any

from fnml.parallel._awake import Awake

_LONGEST = 1 << 20  # bytes of a line; a report on a thousand processes has a tenth of it
_ENDED = "its launcher has ended"


class Link:
    """One end of a line to another launcher.

    A thread reads, so that silence is noticed whatever this side does.

    Args:
      connection: a connected socket, closed by :meth:`close`.
      silence: after so many seconds without a word the line counts as cut.
    """

    def __init__(self, connection: socket.socket, silence: float) -> None:
        self._socket, self._silence = connection, silence
        self._clock, self._heard, self._word = Awake(), 0.0, False
        self._broken: str | None = None
        self._messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        connection.settimeout(None)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            with self._socket.makefile("rb") as lines:
                while line := lines.readline(_LONGEST):
                    message = json.loads(line)
                    if not isinstance(message, dict):
                        raise TypeError(f"it sent {type(message).__name__} instead of an object")
                    self._word = True
                    if message:
                        self._messages.put(message)
            self._broken = self._broken or _ENDED
        except (OSError, ValueError, TypeError, RecursionError) as error:
            self._broken = self._broken or _why(error)

    def send(self, message: dict[str, Any] | None = None) -> None:
        """Send a message, by default a mere beat; a broken line is told by :attr:`lost`."""
        try:
            self._socket.sendall(json.dumps(message or {}).encode() + b"\n")
        except OSError as error:
            self._broken = self._broken or _why(error)

    def receive(self, timeout: float = 0.0) -> dict[str, Any] | None:
        """Return the next message, or ``None`` if none comes in time."""
        with contextlib.suppress(queue.Empty):
            return self._messages.get(timeout=timeout) if timeout else self._messages.get_nowait()
        return None

    @property
    def lost(self) -> str | None:
        """Why the line no longer holds, ``None`` while it does."""
        now = self._clock.now()
        if self._word:
            self._word, self._heard = False, now
        silent = now - self._heard
        if self._broken is None and silent > self._silence:
            self._broken = f"nothing was heard of it for {silent:.1f} s"
        return self._broken

    def close(self) -> None:
        """Hang up."""
        self._broken = self._broken or "hung up"
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _why(error: Exception) -> str:
    """Say what an error of a connection means."""
    # A process that ends with words unread leaves a reset (or a broken pipe) instead of an end.
    if isinstance(error, (ConnectionResetError, BrokenPipeError)):
        return _ENDED
    return f"the connection broke ({error})"


def connect(address: tuple[str, int], silence: float, timeout: float) -> Link:
    """Call another launcher.

    Raises:
      OSError: it does not answer within ``timeout`` seconds.
    """
    return Link(socket.create_connection(address, timeout=timeout), silence)


class Listener:
    """Take the calls of other launchers.

    Raises:
      OSError: this host has no such address, or the port is taken.
    """

    def __init__(self, address: tuple[str, int], silence: float) -> None:
        found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, where = found[0]
        self._server = socket.create_server(where[:2], family=family)
        self._server.setblocking(False)
        self._silence = silence

    def call(self) -> Link | None:
        """Return the next caller, if there is one."""
        with contextlib.suppress(BlockingIOError):
            connection, _ = self._server.accept()
            return Link(connection, self._silence)
        return None

    def close(self) -> None:
        """Take no more calls."""
        self._server.close()
