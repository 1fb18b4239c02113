"""What a data source is: examples that are gathered by index, many at a time."""

from typing import Any, Protocol

import numpy as np

from fnml.core import DataError

Batch = dict[str, np.ndarray]


class Source(Protocol):
    """Examples by index. Everything in :mod:`fnml.data` asks only this of a source.

    Law: ``gather`` is pure, and each example is independent of its neighbours:
    ``gather(concatenate([a, b]))`` is ``gather(a)`` followed by ``gather(b)``, in every field.
    """

    def __len__(self) -> int:
        """The number of examples."""

    def gather(self, indices: np.ndarray) -> Batch:
        """Read the examples ``indices``, an int64 ``[N]`` of any length and order.

        Returns freshly allocated arrays ``[N, ...]`` by field name: they may be handed to a
        device without a copy, so the source must never write to them again.
        """

    @property
    def fingerprint(self) -> str:
        """A hash of the content: a run resumed on other data is refused by it."""


def check_indices(indices: Any, length: int, what: str) -> np.ndarray:
    """Return ``indices`` as int64 ``[N]``, all within ``range(length)``.

    Raises:
      DataError: they are not one-dimensional integers, or one lies outside.
    """
    array = np.asarray(indices)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"{what}: expected a one-dimensional array of integer indices, "
            f"got shape {array.shape} and dtype {array.dtype}"
        )
    # NumPy would take a negative index from the end, silently.
    if array.size and (array.min() < 0 or array.max() >= length):
        at = int(np.flatnonzero((array < 0) | (array >= length))[0])
        raise DataError(
            f"{what}: index {array[at]} (entry {at} of {array.size}) is out of range: "
            f"there are {length} examples, 0 to {length - 1}"
        )
    return array.astype(np.int64, copy=False)


def check_source(source: Source) -> int:
    """Return the source's length.

    Raises:
      DataError: it holds no example.
    """
    length = len(source)
    if length < 1:
        raise DataError(
            f"the source {type(source).__name__} is empty: at least one example is needed"
        )
    return length
