"""Configurations as JSON, read back with every value checked."""

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from fnml.core import ConfigError, nearest

T = TypeVar("T")


def to_json(config: Any) -> dict[str, Any]:
    """Return a configuration dataclass as plain JSON values.

    Raises:
      ConfigError: a number is NaN or infinite, for which JSON has no word; all are listed by path.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Config:
    ...     sizes: tuple[int, ...] = (1, 2)
    >>> to_json(Config())
    {'sizes': [1, 2]}
    """
    faults: list[str] = []

    def plain(value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item, f"{path}/{key}") for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(item, f"{path}/{i}") for i, item in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            faults.append(f"{path.lstrip('/')}: expected a finite number, got {value}")
        return value

    values = plain(dataclasses.asdict(config), "")
    if faults:
        raise ConfigError("the configuration cannot be kept:\n" + "\n".join(faults))
    return values


def from_json(cls: type[T], data: Any) -> T:
    """Build a configuration of type ``cls`` from JSON values.

    Fields that are not given keep their defaults.

    Raises:
      ConfigError: unknown fields or values of a wrong type, all of them listed by path; or a value
        that the configuration itself refuses.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Config:
    ...     sizes: tuple[int, ...] = (1, 2)
    >>> from_json(Config, {"sizes": [3]})
    Config(sizes=(3,))
    """
    faults: list[str] = []
    value = _read(cls, data, "", faults)
    if faults:
        raise ConfigError("the configuration does not fit:\n" + "\n".join(faults))
    return value


def _read(kind: Any, data: Any, path: str, faults: list[str]) -> Any:
    """Convert ``data`` to ``kind``; note what does not fit under its path."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind, data, path, faults)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _read(arguments[0], data, path, faults)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            attempt: list[str] = []
            value = _read(option, data, path, attempt)
            if not attempt:
                return value
    elif origin is typing.Literal:
        if data in arguments:
            return data
    elif origin is tuple and isinstance(data, list):
        if arguments[-1] is Ellipsis:
            return tuple(_read(arguments[0], x, f"{path}/{i}", faults) for i, x in enumerate(data))
        if len(arguments) == len(data):
            pairs = zip(arguments, data, strict=True)
            return tuple(_read(k, x, f"{path}/{i}", faults) for i, (k, x) in enumerate(pairs))
    elif kind is float and isinstance(data, (int, float)) and not isinstance(data, bool):
        # An integer may be too large for a float.
        if abs(data) <= sys.float_info.max:
            return float(data)
    elif kind is type(None) and data is None:
        return None
    elif kind in (int, str, bool) and type(data) is kind:
        return data
    name = getattr(kind, "__name__", None) if origin is None else str(kind)
    faults.append(f"{path.lstrip('/') or 'value'}: expected {name or kind}, got {data!r}")
    return None


def _dataclass(kind: Any, data: Any, path: str, faults: list[str]) -> Any:
    if not isinstance(data, Mapping):
        faults.append(f"{path.lstrip('/') or 'value'}: expected an object, got {data!r}")
        return None
    hints = typing.get_type_hints(kind, include_extras=True)
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    for name in data.keys() - known:
        faults.append(f"{path}/{name}".lstrip("/") + f": no such field.{nearest(name, known)}")
    before = len(faults)
    for field in dataclasses.fields(kind):
        given = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if field.init and not given and field.name not in data:
            faults.append(f"{path}/{field.name}".lstrip("/") + ": missing")
    values = {
        name: _read(hints[name], item, f"{path}/{name}", faults)
        for name, item in data.items()
        if name in known
    }
    if len(faults) > before:
        return None
    try:
        return kind(**values)
    except ConfigError as error:
        faults.append(f"{path.lstrip('/')}: {error}" if path else str(error))
        return None
