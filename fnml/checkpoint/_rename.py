"""Rename the paths of a tree by rules."""

import re
from collections.abc import Iterable, Mapping

from fnml.core import ConfigError, nearest

_WILD = re.compile(r"\*\*/?|\*|\?")


def renamed(names: Iterable[str], rules: Mapping[str, str]) -> dict[str, str]:
    """Return the new path of each of ``names``; the first rule whose glob matches it decides.

    A rule is ``old glob -> new path``. The wildcards of the new path (``*`` inside one segment,
    ``**`` for any number of them, ``?`` for a letter) stand for what the same wildcards of the old
    one matched, in their order.

    Raises:
      ConfigError: a rule matches nothing, its new path has wildcards that the old one does not, or
        two paths would become one; all faults are listed.

    >>> renamed(["body/0/kernel", "head"], {"body/*/**": "layers/*/**"})
    {'body/0/kernel': 'layers/0/kernel', 'head': 'head'}
    """
    names = list(names)
    faults = []
    patterns = []
    for old, new in rules.items():
        wild = _WILD.findall(old)
        if missing := _missing(_WILD.findall(new), wild):
            faults.append(f"  {old!r} -> {new!r}: nothing on the left stands for {missing}")
        pattern = _pattern(old)
        if not any(pattern.match(name) for name in names):
            faults.append(f"  {old!r} matches no path in the file.{nearest(old, names)}")
        patterns.append((pattern, wild, new))
    if faults:
        raise ConfigError("the checkpoint's paths cannot be renamed:\n" + "\n".join(faults))

    result: dict[str, str] = {}
    for name in names:
        found = ((p.match(name), wild, new) for p, wild, new in patterns)
        result[name] = next(
            (_filled(new, wild, match.groups()) for match, wild, new in found if match), name
        )
    taken: dict[str, str] = {}
    for name, new in result.items():
        if new in taken:
            faults.append(f"  {taken[new]} and {name} would both be {new}")
        taken[new] = name
    if faults:
        raise ConfigError("the checkpoint's paths cannot be renamed:\n" + "\n".join(faults))
    return result


def _pattern(glob: str) -> re.Pattern[str]:
    parts, at = [], 0
    groups = {"**": "(.*)", "**/": "((?:.*/)?)", "*": "([^/]*)", "?": "([^/])"}
    for wild in _WILD.finditer(glob):
        parts += [re.escape(glob[at : wild.start()]), groups[wild[0]]]
        at = wild.end()
    return re.compile("".join(parts) + re.escape(glob[at:]) + r"\Z", re.DOTALL)


def _missing(new: list[str], old: list[str]) -> list[str]:
    """List wildcards of the new path beyond those of the old one."""
    left = list(old)
    return [wild for wild in new if wild not in left or left.remove(wild)]  # type: ignore[func-returns-value]


def _filled(new: str, wild: list[str], groups: tuple[str, ...]) -> str:
    left = list(zip(wild, groups, strict=True))

    def fill(match: re.Match[str]) -> str:
        pair = next(pair for pair in left if pair[0] == match[0])
        left.remove(pair)
        return pair[1]

    return _WILD.sub(fill, new)
