"""Find a user's loss, and the example to run it on."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fnml.core import ConfigError, nearest

_HOW = """define in that module, next to the loss:

    def {name}():
        return params, batch          # or: params, batch, key"""


class Example(NamedTuple):
    """A loss, and what it is called with."""

    loss_fn: Callable[..., Any]
    params: Any
    batch: Any
    key: Any = None


def load_example(reference: str, name: str) -> Example:
    """Import ``module:function`` from the current directory or the path, and call its example.

    Raises:
      ConfigError: the reference is no ``module:function``, the module or the name is not there,
        or the example does not return ``(params, batch)`` or ``(params, batch, key)``.
    """
    module_name, colon, function_name = reference.partition(":")
    if not (module_name and colon and function_name):
        raise ConfigError(f"expected MODULE:FUNCTION, such as my_module:loss_fn, got {reference!r}")
    # As `python -m` does: a user's module lies where the user stands.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"there is no module {module_name!r}, neither in {here} nor installed: write it as in "
            "'import MODULE', without .py"
        ) from error
    loss_fn = _attribute(module, function_name, f"{module_name} has no function {function_name!r}.")
    how = _HOW.format(name=name)
    missing = f"{module_name} has no function {name!r} for params and batch: {how}\n"
    got = _attribute(module, name, missing)()
    if not isinstance(got, tuple) or len(got) not in (2, 3):
        kind = f"a tuple of {len(got)}" if isinstance(got, tuple) else type(got).__name__
        raise ConfigError(f"{module_name}:{name}() returns {kind}: {how}")
    return Example(loss_fn, *got)


def _attribute(module: Any, name: str, missing: str) -> Callable[..., Any]:
    found = getattr(module, name, None)
    if not callable(found):
        names = [n for n, value in vars(module).items() if callable(value)]
        raise ConfigError(missing + nearest(name, names))
    return found
