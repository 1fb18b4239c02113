"""``fnml train [RECIPE] [options]``."""

from collections.abc import Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from fnml.cli._finish import report
from fnml.core import ConfigError
from fnml.recipes import FLAT, Output, find_recipe, recipe_names, start

_Out = Annotated[
    Path | None,
    tyro.conf.arg(
        metavar="PATH", help="The run's directory, new or empty; by default a new one below runs/."
    ),
]


def _help() -> str:
    lines = [f"  {name:<9} {_summary(name)}" for name in recipe_names()]
    return "\n".join(
        [
            "usage: fnml train [RECIPE] [options]",
            "",
            "Train a recipe in a new run directory below runs/. Without a name: digits.",
            "",
            *lines,
            "",
            "'fnml train RECIPE --help' shows a recipe's options.",
        ]
    )


def _summary(name: str) -> str:
    try:
        return find_recipe(name).summary
    except ConfigError as error:
        return f"(cannot be used: {error})"


def command(arguments: Sequence[str]) -> int:
    """Parse a recipe's configuration from the command line and train it."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    named = bool(arguments) and not arguments[0].startswith("-")
    name, rest = (arguments[0], arguments[1:]) if named else ("digits", arguments)
    recipe = find_recipe(name)
    # Built for this recipe's configuration, so that one parser checks everything at once.
    parser: Any = make_dataclass(
        "Train",
        [
            ("config", Annotated[recipe.config, FLAT], field(default_factory=recipe.config)),
            ("output", Annotated[Output, FLAT], field(default_factory=Output)),
            ("out", _Out, None),
        ],
        namespace={"__doc__": recipe.config.__doc__},
    )
    parsed = tyro.cli(parser, args=rest, prog=f"fnml train {name}")
    return report(start(name, parsed.config, parsed.out, parsed.output))
