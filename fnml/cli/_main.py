"""Find the command, run it, and turn errors into one sentence and an exit code."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import fnml
from fnml.core import FnmlError, nearest


class Command(NamedTuple):
    """A subcommand: what it does, and the function that does it, imported when it is called."""

    summary: str
    module: str


COMMANDS = {
    "train": Command("train a recipe: digits (the default), lm, or a plugin's", "_train"),
    "resume": Command("continue a run that was stopped or killed, to the same bits", "_resume"),
    "eval": Command("evaluate a run's model on its held-out set", "_eval"),
    "sample": Command("draw from a run's model", "_sample"),
    "runs": Command("list runs, or compare some", "_runs"),
    "doctor": Command("show versions and devices, and what is missing", "_doctor"),
    "plugins": Command("list recipes, models and sinks that installed packages bring", "_plugins"),
}


def _usage() -> str:
    lines = [f"  {name:<9} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fnml COMMAND ...",
            "",
            (fnml.__doc__ or "").strip(),
            "",
            *lines,
            "",
            "'fnml COMMAND --help' shows a command's options; 'fnml --version' the version.",
            "FNML_LOG_LEVEL=info|debug shows more of what happens.",
        ]
    )


def _load(name: str) -> Callable[[Sequence[str]], int]:
    import importlib

    return importlib.import_module(f"fnml.cli.{COMMANDS[name].module}").command


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Exit codes: 0 done, or stopped cleanly by Ctrl-C; 1 refused, with the reason on stderr; 2 wrong
    usage; 143 stopped cleanly by SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    level = os.environ.get("FNML_LOG_LEVEL", "warning").upper()
    if level not in logging.getLevelNamesMapping():
        sys.exit(f"fnml: FNML_LOG_LEVEL={level.lower()}: expected debug, info, warning or error")
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        sys.exit(0)
    name, *rest = arguments
    if name == "--version":
        print(f"fnml {fnml.__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        print(
            f"fnml: there is no command {name!r}.{nearest(name, COMMANDS)}\n\n{_usage()}",
            file=sys.stderr,
        )
        sys.exit(2)
    try:
        code = _load(name)(rest)
    except FnmlError as error:
        print(f"fnml: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("fnml: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # Whoever read the output has had enough; nothing more can be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)
