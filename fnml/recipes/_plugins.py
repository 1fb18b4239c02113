"""What is available by name: built in, or from installed packages' entry points."""

from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

from fnml.core import ConfigError, nearest
from fnml.recipes._recipe import Recipe

GROUPS = ("fnml.recipes", "fnml.models", "fnml.sinks")
_BUILT_IN = ("digits", "lm", "finetune")


class Plugin(NamedTuple):
    """One entry point: its group and name, what it refers to, and who brings it."""

    group: str
    name: str
    value: str
    distribution: str


def plugins() -> list[Plugin]:
    """List the entry points that installed packages offer to fnml; nothing is imported.

    >>> all(plugin.group in GROUPS for plugin in plugins())
    True
    """
    return [
        Plugin(group, point.name, point.value, point.dist.name if point.dist else "unknown")
        for group in GROUPS
        for point in sorted(entry_points(group=group), key=lambda point: point.name)
    ]


def load_plugin(group: str, name: str) -> Any:
    """Import what the entry point ``name`` of ``group`` refers to.

    Raises:
      ConfigError: there is none of that name, several packages bring it, or it fails to import.
    """
    points: list[EntryPoint] = list(entry_points(group=group, name=name))
    if not points:
        known = {point.name for point in entry_points(group=group)}
        raise ConfigError(f"no plugin {name!r} in {group}.{nearest(name, known)}")
    if len({point.value for point in points}) > 1:
        brought = ", ".join(f"{p.value} of {p.dist.name if p.dist else '?'}" for p in points)
        raise ConfigError(f"the plugin {name!r} in {group} is ambiguous: {brought}")
    try:
        return points[0].load()
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"the plugin {name!r} in {group} ({points[0].value}) fails to import: "
            f"{type(error).__name__}: {error}"
        ) from error


def recipe_names() -> list[str]:
    """Return the names of all recipes, built-in ones first."""
    added = {point.name for point in entry_points(group="fnml.recipes")}
    return [*_BUILT_IN, *sorted(added.difference(_BUILT_IN))]


def find_recipe(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
      ConfigError: there is no recipe of that name, or a plugin's is not a :class:`Recipe`.

    >>> find_recipe("digist")
    Traceback (most recent call last):
    fnml.core._errors.ConfigError: there is no recipe 'digist'. Did you mean 'digits'? ...
    """
    if name == "digits":
        from fnml.recipes._digits import digits

        return digits
    if name == "lm":
        from fnml.recipes._lm import lm

        return lm
    if name == "finetune":
        from fnml.recipes._finetune import finetune

        return finetune
    names = recipe_names()
    if name not in names:
        raise ConfigError(
            f"there is no recipe {name!r}.{nearest(name, names)} There are: {', '.join(names)}"
        )
    recipe = load_plugin("fnml.recipes", name)
    if not isinstance(recipe, Recipe):
        raise ConfigError(
            f"the plugin {name!r} in fnml.recipes is a {type(recipe).__name__}, expected a Recipe"
        )
    return recipe
