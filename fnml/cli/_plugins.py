"""``fnml plugins``."""

from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from rich.table import Table

from fnml.cli._show import show
from fnml.core import ConfigError
from fnml.recipes import find_recipe, load_plugin, plugins


@dataclass(frozen=True)
class Plugins:
    """List what installed packages add through entry points, and whether it imports."""


def command(arguments: Sequence[str]) -> int:
    """Print a table of plugins; return 1 if one of them fails to import."""
    tyro.cli(Plugins, args=arguments, prog="fnml plugins")
    found = plugins()
    if not found:
        print("no plugins are installed; packages add them with entry points, see docs/plugins.md")
        return 0
    table = Table("group", "name", "from", "refers to", "state")
    failed = False
    for plugin in found:
        try:
            if plugin.group == "fnml.recipes":
                find_recipe(plugin.name)
            else:
                load_plugin(plugin.group, plugin.name)
            state = "fine"
        except ConfigError as error:
            state, failed = str(error), True
        table.add_row(plugin.group, plugin.name, plugin.distribution, plugin.value, state)
    show(table)
    return int(failed)
