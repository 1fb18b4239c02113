"""Find the command, run it, and turn errors into one sentence and an exit code."""

import contextlib
import gc
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import fnml
from fnml.core import ConfigError, FnmlError, nearest

_logger = logging.getLogger("fnml")
# What JAX says of the machine rather than of the program: the device is full, or not there.
_ENVIRONMENT = ("RESOURCE_EXHAUSTED", "Unable to initialize backend")
# And what it says when another process has gone.
_CONNECTION = ("Gloo", "coordination service", "CoordinationService")


class Command(NamedTuple):
    """A subcommand: what it does, and the function that does it, imported when it is called."""

    summary: str
    module: str


COMMANDS = {
    "train": Command("train a recipe: digits (the default), lm, finetune, or a plugin's", "_train"),
    "resume": Command("continue a run that was stopped or killed, to the same bits", "_resume"),
    "launch": Command("run train or resume in several processes, and watch over them", "_launch"),
    "eval": Command("evaluate a run's model on its held-out set, or an ONNX file", "_eval"),
    "sample": Command("draw from a run's model", "_sample"),
    "runs": Command("list runs, or compare some", "_runs"),
    "export": Command("write a run's model as ONNX, and check the file", "_export"),
    "verify": Command(
        "check a run for damage, or kill runs on purpose: fnml verify crash", "_verify"
    ),
    "plan": Command("say what a training step needs on chips that are not there", "_plan"),
    "replay": Command("rebuild the exact state and batch of any step of a run", "_replay"),
    "diff": Command("find the first step, parameter and example at which two runs part", "_diff"),
    "laws": Command("check the laws of the transforms on your own loss", "_laws"),
    "check": Command("find faults in your loss: fnml check loss, fnml check grad", "_check"),
    "bench": Command("measure fnml beside its peers: fnml bench steps, and other suites", "_bench"),
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
            "'fnml --no-cache COMMAND' neither reads nor writes compiled programs in the cache folder",
            "(FNML_CACHE_DIR names another one, or is off; 'fnml doctor' shows where it is).",
            "FNML_LOG_LEVEL=info|debug shows more of what happens, and where an error was raised.",
        ]
    )


def _load(name: str) -> Callable[[Sequence[str]], int]:
    import importlib

    return importlib.import_module(f"fnml.cli.{COMMANDS[name].module}").command


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Exit codes: 0 done, or stopped cleanly by Ctrl-C; 1 refused, with the reason on stderr; 2 wrong
    usage; 75 in one of several processes: something unexpected, such as the loss of another one;
    130 interrupted; 141 whoever read the output has gone; 143 stopped cleanly by SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # What is made while starting mostly stays: looking for garbage in it takes a tenth of the time.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    _prepare_output()
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except FnmlError as error:
        code = _complain(error, str(error))
    except MemoryError as error:
        code = _complain(error, f"there is not enough memory: {error}")
    except RuntimeError as error:
        known = any(cause in str(error) for cause in _ENVIRONMENT)
        code = _complain(error, str(error)) if known else _unexpected(error)
    except KeyboardInterrupt:
        print("fnml: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        code = 141
    except OSError as error:
        code = _complain(error, str(error))
    except Exception as error:  # noqa: BLE001 (it is raised again)
        code = _unexpected(error)
    finally:
        _finish_output()
    if code not in (0, 143) and _together():
        # Python's exit would wait for the other processes, which wait for this one.
        os._exit(code)
    sys.exit(code)


def _run(arguments: Sequence[str]) -> int:
    level = (os.environ.get("FNML_LOG_LEVEL") or "warning").upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ConfigError(f"FNML_LOG_LEVEL={level.lower()}: expected debug, info, warning or error")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    _logger.setLevel(level)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    name, *rest = arguments
    cached = name != "--no-cache"
    if not cached and rest:
        name, *rest = rest
    if name == "--version":
        print(f"fnml {fnml.__version__}")
        return 0
    if name not in COMMANDS:
        hint = nearest(name, (*COMMANDS, "--help", "--no-cache", "--version"))
        print(f"fnml: there is no command {name!r}.{hint}\n\n{_usage()}", file=sys.stderr)
        return 2
    if cached:
        fnml.compilation_cache()
    return _load(name)(rest)


def _complain(error: BaseException, reason: str) -> int:
    """Say in one sentence what went wrong; the traceback is for those who ask for it."""
    # JAX adds a note on its own frames, between lines.
    notes = [note for note in getattr(error, "__notes__", ()) if not note.startswith("---")]
    with contextlib.suppress(OSError):
        print("\n".join([f"fnml: {reason}", *notes]), file=sys.stderr)
    _logger.debug("the error was raised here", exc_info=error)
    return 1


def _together() -> bool:
    """Tell whether this process has joined others."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _unexpected(error: Exception) -> int:
    """Raise on; but one of several processes, which another may have failed, has to end at once."""
    if not _together():
        raise error
    if any(sign in str(error) for sign in _CONNECTION):
        _complain(error, f"the connection to another process failed: {error}")
    else:
        traceback.print_exception(error)
    return 75


def _prepare_output() -> None:
    """Make sure that no line can end a run: not by its letters, nor because nobody listens."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 (until Python exits)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _finish_output() -> None:
    """Write what is left; drop what cannot be written, so that Python's exit does not try again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
