"""Check the fields of a configuration, and report every fault at once."""

from typing import Any

from fnml.core import ConfigError, nearest


def at_least(config: Any, minimum: int, *fields: str) -> list[str]:
    """Return a fault for each field that is below ``minimum``; a field may be a tuple.

    A field that is ``None`` is left to its default.
    """
    faults = []
    for field in fields:
        value = getattr(config, field)
        sizes = value if isinstance(value, tuple) else () if value is None else (value,)
        if any(size < minimum for size in sizes):
            faults.append(f"{field}={value}: expected {minimum} or more")
    return faults


def one_of(config: Any, field: str, options: tuple[Any, ...]) -> list[str]:
    """Return a fault if the field is none of ``options``."""
    value = getattr(config, field)
    if value in options:
        return []
    names = [option for option in options if isinstance(option, str)]
    hint = nearest(str(value), names)
    return [f"{field}={value!r}: expected one of {', '.join(map(repr, options))}.{hint}"]


def rate(config: Any, field: str) -> list[str]:
    """Return a fault if the field is outside of [0, 1)."""
    value = getattr(config, field)
    return [] if 0 <= value < 1 else [f"{field}={value}: expected 0 or more, and below 1"]


def refuse(config: Any, faults: list[str]) -> None:
    """Raise all faults in one error, or do nothing if there are none.

    Raises:
      ConfigError: there is a fault.
    """
    if faults:
        raise ConfigError(f"{type(config).__name__}: " + "; ".join(faults))
