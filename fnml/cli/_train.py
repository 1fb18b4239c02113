"""``fnml train [RECIPE] [options]``."""

from collections.abc import Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from fnml.cli._finish import report
from fnml.recipes import FLAT, Output, find_recipe, new_directory, recipe_names, start


def _help() -> str:
    lines = [f"  {name:<9} {find_recipe(name).summary}" for name in recipe_names()]
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
            ("out", Path | None, None),
        ],
        namespace={"__doc__": recipe.config.__doc__},
    )
    parsed = tyro.cli(parser, args=rest, prog=f"fnml train {name}")
    directory = parsed.out or new_directory(Path("runs"), name)
    return report(start(name, parsed.config, directory, parsed.output))
