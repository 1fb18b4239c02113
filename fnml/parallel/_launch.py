"""Run a command in several processes."""

import contextlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from fnml.core import ConfigError
from fnml.parallel._follower import follow
from fnml.parallel._launch_options import Launch
from fnml.parallel._ranks import Ranks
from fnml.parallel._supervisor import Supervisor

_OURS = ("train", "resume")


def launch(options: Launch, command: Sequence[str], commands: Sequence[str] = _OURS) -> int:
    """Run a command in several processes, and start them again where one is lost.

    A command of ours (``train ...`` or ``resume RUN``) is resumed from its newest whole checkpoint.
    Any other program is started again as it is: it calls :func:`fnml.parallel.initialize` first,
    and saves and restores by itself.

    Args:
      options: how many, where, and what to do when one is lost.
      command: the words of the command.
      commands: the names of all our commands, of which only two train.

    Returns:
      The exit code: 0 if all processes ended well, 143 if SIGTERM stopped them cleanly, the code of
      a process that refused what was asked.

    Raises:
      ConfigError: there is no command, or one that does not train.
      RunError: hosts do not come, or processes are lost more often than may be.
    """
    if not command:
        raise ConfigError("there is nothing to launch: fnml launch -n 2 -- train lm ...")
    ours = command[0] in _OURS
    if command[0] in commands and not ours:
        raise ConfigError(
            f"'fnml {command[0]}' runs in one process: launch takes {' and '.join(_OURS)}, or "
            "another program, such as: fnml launch -n 2 -- python script.py"
        )
    program = [sys.executable, "-m", "fnml", *command] if ours else [*command]
    if not ours and shutil.which(program[0]) is None:
        raise ConfigError(f"there is no program {program[0]!r}, nor such a command of fnml")
    with tempfile.TemporaryDirectory(prefix="fnml-launch-") as folder, _signals() as signals:
        ranks = Ranks(Path(folder))
        try:
            if options.host:
                return follow(options, program, ours, ranks, signals)
            return Supervisor(options, program, ours, ranks, signals).run()
        finally:
            ranks.end()


@contextlib.contextmanager
def _signals() -> Iterator["_Caught"]:
    caught = _Caught()
    before = {n: signal.signal(n, caught.take) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Caught:
    """The signals that this process has got so far."""

    def __init__(self) -> None:
        self._numbers: list[int] = []

    def take(self, number: int, frame: FrameType | None) -> None:
        self._numbers.append(number)

    def __call__(self) -> list[int]:
        return [*self._numbers]
