"""A part of a source as a source, and a source in two parts."""

import functools
import hashlib
from dataclasses import dataclass

import numpy as np

from fnml.core import DataError
from fnml.data._permute import mix, permute
from fnml.data._source import Batch, Source, check_indices, check_source


@dataclass(frozen=True, eq=False)
class Subset:
    """The examples ``indices`` of another source, in that order; nothing is copied.

    Law: ``Subset(source, i).gather(j) == source.gather(i[j])``.

    Raises:
      DataError: there is no index, or one is out of range.

    >>> import numpy as np
    >>> from fnml.data import ArraySource
    >>> even = Subset(ArraySource({"x": np.arange(6)}), np.array([0, 2, 4]))
    >>> len(even), even.gather(np.array([2]))["x"].tolist()
    (3, [4])
    """

    source: Source
    indices: np.ndarray

    def __post_init__(self) -> None:
        indices = check_indices(self.indices, len(self.source), "Subset").copy()
        if not indices.size:
            raise DataError("a Subset needs at least one index: got none")
        indices.flags.writeable = False
        object.__setattr__(self, "indices", indices)

    def __len__(self) -> int:
        return len(self.indices)

    def gather(self, indices: np.ndarray) -> Batch:
        """Read the examples ``indices`` of the subset, ``[N, ...]``.

        Raises:
          DataError: an index is out of range.
        """
        return self.source.gather(self.indices[check_indices(indices, len(self), "Subset")])

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the whole source's fingerprint and of every index."""
        digest = hashlib.blake2b(self.source.fingerprint.encode(), digest_size=16)
        digest.update(self.indices.tobytes())
        return digest.hexdigest()


def split(source: Source, held_out: float, seed: int = 0) -> tuple[Subset, Subset]:
    """Split a source at random into what to train on and what to hold out.

    Law: the two are disjoint, complete, in the source's order, and the same for the same
    length, ``held_out`` and ``seed``. Memory: 8 bytes for each example.

    Args:
      source: what to split.
      held_out: how many examples to hold out: an int is a count, a float a fraction between 0 and 1
        (rounded to whole examples).
      seed: which split.

    Raises:
      DataError: either part would be empty.

    >>> import numpy as np
    >>> from fnml.data import ArraySource
    >>> train, test = split(ArraySource({"x": np.arange(10)}), 0.2)
    >>> len(train), len(test), sorted([*train.indices.tolist(), *test.indices.tolist()])
    (8, 2, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    length = check_source(source)
    wanted = float(held_out) * length if isinstance(held_out, float | np.floating) else held_out
    count = round(wanted) if np.isfinite(wanted) else -1
    if not 0 < count < length:
        raise DataError(
            f"split: held_out is {held_out!r}, {count} of {length} examples: expected 1 to "
            f"{length - 1} examples, or the fraction for it as a float"
        )
    order = permute(np.arange(length), length, mix(seed))
    return Subset(source, np.sort(order[count:])), Subset(source, np.sort(order[:count]))
