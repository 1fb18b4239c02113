"""``fnml launch -n N [options] -- COMMAND ...``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from fnml.parallel import Launch, launch


@dataclass(frozen=True)
class Options(Launch):
    """The launcher's options, with a short name for the one that is always given."""

    processes: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """Processes on this host."""


def command(arguments: Sequence[str]) -> int:
    """Run a command in several processes, and watch over them."""
    from fnml.cli._main import COMMANDS

    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    options = tyro.cli(
        Options,
        args=words[:at],
        prog="fnml launch",
        description=(
            f"{(Launch.__doc__ or '').strip().splitlines()[0]} The command follows after '--': "
            "train ..., resume RUN, or a program that calls fnml.parallel.initialize()."
        ),
    )
    return launch(options, words[at + 1 :], tuple(COMMANDS))
