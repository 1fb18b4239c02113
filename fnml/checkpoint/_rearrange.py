"""Axes turned, split and joined, by one sentence that can be read backwards."""

import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

_GROUP = re.compile(r"\(([\w\s]*)\)|(\w+)|(\S)")

Groups = tuple[tuple[str, ...], ...]


class Axes(NamedTuple):
    """``"(h k) d -> d h k"``: the axes of an array before and after; brackets join axes.

    The notation is that of einops (Rogozhnikov 2022).

    >>> axes = Axes.parse("(h k) d -> d h k")
    >>> axes.there(np.zeros((6, 5)), (5, 2, 3)).shape, axes.back(np.zeros((5, 2, 3))).shape
    ((5, 2, 3), (6, 5))
    """

    before: Groups
    after: Groups

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the sentence.

        Raises:
          ValueError: it is not well-formed, or one side has an axis that the other has not.
        """
        sides = text.split("->")
        if len(sides) != 2:
            raise ValueError(f"{text!r} has {len(sides) - 1} arrows, expected one")
        before, after = (_groups(side) for side in sides)
        names = [sorted(itertools.chain(*side)) for side in (before, after)]
        if names[0] != names[1] or len(set(names[0])) < len(names[0]):
            raise ValueError(f"{text!r} has not each axis once on either side")
        return cls(before, after)

    def sizes(
        self, before: tuple[int, ...] | None, after: tuple[int, ...] | None
    ) -> dict[str, int]:
        """Return the size of each axis from the shapes that are known.

        Raises:
          ValueError: the shapes contradict each other or the sentence, or do not say enough.
        """
        known: dict[str, int] = {}
        sides = [(self.before, before), (self.after, after)]
        for groups, shape in sides:
            if shape is not None and len(groups) != len(shape):
                raise ValueError(f"has shape {shape}, expected {len(groups)} axes for {self}")
        groups_sizes = [
            pair
            for groups, shape in sides
            if shape is not None
            for pair in zip(groups, shape, strict=True)
        ]
        # Every round that learns nothing is the last; an axis is learnt once.
        for _ in range(len(list(itertools.chain(*self.before))) + 1):
            for group, size in groups_sizes:
                unknown = [name for name in group if name not in known]
                rest = math.prod(known[name] for name in group if name in known)
                if len(unknown) == 1 and rest and size % rest == 0:
                    known[unknown[0]] = size // rest
        if missing := set(itertools.chain(*self.before)) - known.keys():
            raise ValueError(
                f"the shapes {before} and {after} do not say how large {sorted(missing)} are"
            )
        for group, size in groups_sizes:
            if math.prod(known[name] for name in group) != size:
                raise ValueError(f"has shape {before}, and {self} does not make it {after}")
        return known

    def there(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Turn an array of their layout into one of ``shape`` in ours."""
        return _rearranged(array, self.before, self.after, self.sizes(array.shape, shape))

    def back(self, array: np.ndarray) -> np.ndarray:
        """Turn an array of our layout into theirs."""
        return _rearranged(array, self.after, self.before, self.sizes(None, array.shape))

    def __str__(self) -> str:
        sides = (" ".join(_text(group) for group in side) for side in self)
        return repr(" -> ".join(sides))


def _text(group: tuple[str, ...]) -> str:
    return group[0] if len(group) == 1 else f"({' '.join(group)})"


def _groups(text: str) -> Groups:
    groups = []
    for joined, single, wrong in _GROUP.findall(text):
        if wrong:
            raise ValueError(f"{text.strip()!r} has {wrong!r}, expected names and brackets")
        groups.append((single,) if single else tuple(joined.split()))
    return tuple(groups)


def _rearranged(
    array: np.ndarray, before: Groups, after: Groups, sizes: dict[str, int]
) -> np.ndarray:
    order = list(itertools.chain(*before))
    split = array.reshape([sizes[name] for name in order])
    turned = split.transpose([order.index(name) for name in itertools.chain(*after)])
    return turned.reshape(_shape(after, sizes))


def _shape(groups: Sequence[tuple[str, ...]], sizes: dict[str, int]) -> list[int]:
    return [math.prod(sizes[name] for name in group) for group in groups]
