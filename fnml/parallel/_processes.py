"""Several processes that train together: who they are, and how they agree."""

import contextlib
import json
import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from fnml.parallel._pulse import Pulse

_LOOK = 0.25  # seconds between looks at what others wish
_PATIENCE = 10_000  # milliseconds that one request to the coordinator may wait


class Processes:
    """The processes of a run, seen from one of them; a run of one process has one, too.

    Between steps they talk through the coordinator's store, never through their devices: nothing
    here waits for a computation or is compiled.

    Attributes:
      index: which process this is.
      count: how many there are.

    >>> alone = Processes()
    >>> alone.share("step", 7), alone.agree(3, {"stop": "SIGTERM"})
    (7, {'stop': 'SIGTERM'})
    """

    def __init__(
        self,
        index: int = 0,
        count: int = 1,
        client: Any = None,
        directory: Path | None = None,
        pulse: Pulse | None = None,
    ) -> None:
        self.index, self.count = index, count
        self._client, self._directory, self._pulse = client, directory, pulse
        # Of the agreement under way: its number, whether this process has posted, and how many
        # calls of agree() have returned.
        self._round, self._posted, self._calls = 0, False, 0
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._listener = threading.Thread(target=self._listen, name="fnml-agree", daemon=True)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.index == 0

    @property
    def watched(self) -> bool:
        """Whether a launcher watches over this process."""
        return self._pulse is not None

    def beat(self, step: int | None = None) -> None:
        """Tell the launcher, where there is one, that this process gets on."""
        if self._pulse is not None:
            self._pulse.beat(step)

    def announce(self, run: Mapping[str, Any]) -> None:
        """Tell the launcher, where there is one, what to resume should a process be lost."""
        if self._directory is not None and self.first:
            (self._directory / "run").write_text(json.dumps(run))

    def share(self, name: str, value: Any = None) -> Any:
        """Return process 0's ``value``, as JSON has it, on every process; the others wait for it.

        Args:
          name: what it is; each may be shared once.
          value: what process 0 has to say; what the others pass is not looked at.
        """
        if self.count == 1:
            return value
        key = f"fnml/shared/{name}"
        if self.first:
            self._client.key_value_set(key, json.dumps(value))
            return value
        return json.loads(self._get(key))

    def gather(self, name: str, value: str) -> list[str] | None:
        """Return the ``value`` of every process on process 0, which waits; ``None`` elsewhere."""
        if self.count > 1:
            self._client.key_value_set(f"fnml/gathered/{name}/{self.index}", value)
        if not self.first:
            return None
        others = range(1, self.count)
        return [value, *(self._get(f"fnml/gathered/{name}/{i}") for i in others)]

    def _get(self, key: str) -> str:
        while True:
            # Without a limit of its own: what waits for a process that is lost is ended by JAX, or
            # by the launcher.
            with contextlib.suppress(_Late):
                return _ask(self._client.blocking_key_value_get, key, _PATIENCE)
            self.beat()

    def agree(self, step: int, wishes: Mapping[str, str] | None) -> dict[str, str]:
        """Turn the wishes of any process into what all of them do after the same step.

        Every process calls it after the same steps. Where one wishes something, because it got a
        signal or because its clock says so, every process posts how many of these calls it has
        come through, and passes none before all have posted: the first call that nobody has come
        through yet then returns everyone's wishes. So no process is left alone in a collective
        operation, though clocks and signals differ.

        Processes post from a thread: the caller may wait for a computation that needs steps which
        another process, waiting here, has not begun.

        Args:
          step: the number of steps done.
          wishes: what this process would do now, by name; ``None`` where no step follows.

        Returns:
          What to do now, the same in every process; mostly nothing.
        """
        self.beat(step)
        if self.count == 1:
            return dict(wishes or {})
        if wishes is None:
            self._close()
            return {}
        if not self._listener.is_alive():
            self._listener.start()
        with self._lock:
            if wishes and not self._posted:
                self._post(wishes)
            if not self._posted:
                self._calls += 1
                return {}
        due, agreed = self._everyones()
        with self._lock:
            reached = self._calls == due
            self._calls += 1
            if reached:
                self._round, self._posted = self._round + 1, False
        return agreed if reached else {}

    def _everyones(self) -> tuple[float, dict[str, str]]:
        """Wait for all posts of this round; return at which call they hold, and the wishes."""
        while len(posts := self._posts()) < self.count:
            if self._client.key_value_dir_get("fnml/closed/"):
                return math.inf, {}  # all of them end before another call
            self.beat()
            time.sleep(0.005)
        wishes = {name: why for _, wish in posts for name, why in wish.items()}
        return max(calls for calls, _ in posts), wishes

    def _post(self, wishes: Mapping[str, str]) -> None:
        key = f"fnml/agreed/{self._round}/{self.index:06}"
        self._client.key_value_set(key, json.dumps([self._calls, dict(wishes)]))
        self._posted = True

    def _posts(self) -> list[tuple[int, dict[str, str]]]:
        """Read what was posted this round, in the order of the processes."""
        found = self._client.key_value_dir_get(f"fnml/agreed/{self._round}/")
        return [tuple(json.loads(text)) for _, text in sorted(found)]

    def _listen(self) -> None:
        """Post when another process has a wish; run in the thread."""
        while not self._closed.wait(_LOOK):
            at = self._round
            try:
                if any(wish for _, wish in self._posts()):
                    with self._lock:
                        if at == self._round and not self._posted:
                            self._post({})
            except jax.errors.JaxRuntimeError:
                return  # the coordinator is gone; whoever computes notices, too

    def _close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            self._client.key_value_set(f"fnml/closed/{self.index:06}", "")


class _Late(Exception):
    """The coordinator has had no answer yet."""


def _ask(get: Any, key: str, patience: int) -> str:
    try:
        return get(key, patience)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            raise _Late from error
        raise
