"""Import an optional package, or say which extra brings it."""

import importlib
from types import ModuleType

from fnml.core._errors import MissingExtraError


def require(module: str, *, extra: str) -> ModuleType:
    """Import ``module``, which the optional dependency group ``extra`` installs.

    Raises:
      MissingExtraError: the package is not installed.

    >>> require("json", extra="none").dumps([1])
    '[1]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A package that is there but broken must not be reported as missing.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise MissingExtraError(
            f"this needs the package {module.split('.')[0]!r}, which is not installed: "
            f"pip install 'fnml[{extra}]'"
        ) from error
