"""An endless stream of batches, described by a handful of numbers."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from fnml.core import DataError
from fnml.data._feed import Feed
from fnml.data._groups import groups
from fnml.data._permute import mix, mix_array, permute
from fnml.data._source import Batch, Source, check_source

_VERSION = 2
_SEED_BITS = 63
_MAX_POSITION = 1 << 62


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


@dataclass(frozen=True, eq=False)
class Batches:
    """Describe an endless stream of shuffled batches; nothing in it changes.

    The example at global position ``p`` is ``permute(p % n, n, key(seed, p // n))`` of the
    source: each epoch is its own permutation, a batch may straddle two epochs, and no example is
    dropped or repeated. So ``position``, the number of examples seen, is the whole state.

    Law: the stream at a position does not depend on how it was reached, in which portions it
    was read, or how far ahead: ``take(p, k)[i] == at(p + i * batch_size)``, bitwise.

    Args:
      source: where examples come from.
      batch_size: B, at least 1; it may exceed the source.
      seed: below ``2**63``; with the source's length, it determines every epoch's order.
      shuffle: ``False`` reads each epoch in the source's order.
      position: where to begin, in examples.
      map: ``map(batch, positions) -> batch`` on the host, for each portion read: fields
        ``[N, ...]`` and int64 positions ``[N]``, for an ``N`` that varies. It is your duty that
        example ``i`` of the result depends on nothing but example ``i`` and ``positions[i]``:
        draw random numbers with ``random_bits(seed, positions)``. It must not keep or reuse
        the arrays that it returns.

    Raises:
      DataError: the source is empty, or a number is out of range; every fault is listed.

    >>> import numpy as np
    >>> from fnml.data import ArraySource
    >>> batches = Batches(ArraySource({"x": np.arange(5)}), batch_size=3)
    >>> first = batches.take(0, 5)["x"]
    >>> first.shape, np.bincount(first.ravel()).tolist()
    ((5, 3), [3, 3, 3, 3, 3])
    """

    source: Source
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    position: int = 0
    map: Callable[[Batch, np.ndarray], Batch] | None = None

    def __post_init__(self) -> None:
        check_source(self.source)
        bounds = {
            "batch_size": (1, 1 << 40),
            "seed": (0, (1 << _SEED_BITS) - 1),
            "position": (0, _MAX_POSITION),
        }
        faults = []
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not _is_int(value) or not low <= value <= high:
                faults.append(f"{name} is {value!r}: expected an integer from {low} to {high}")
            else:
                object.__setattr__(self, name, int(value))
        if faults:
            raise DataError("these batches cannot be made:\n" + "\n".join(faults))

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Return which examples of the source stand at global ``positions``; int64 ``[N]``."""
        n = len(self.source)
        positions = np.asarray(positions, np.int64)
        if not positions.size:
            return positions
        first, last = int(positions.min()) // n, int(positions.max()) // n
        seed = mix(self.seed)
        if first == last:
            offsets = positions - first * n
            key: int | np.ndarray = mix(seed + first)
        else:
            epochs, offsets = np.divmod(positions, n)
            key = mix_array(epochs.astype(np.uint64) + np.uint64(seed))
        return permute(offsets, n, key) if self.shuffle else offsets

    def gather(self, positions: np.ndarray) -> Batch:
        """Read the examples at global ``positions`` ``[N]``, mapped; host arrays ``[N, ...]``.

        Raises:
          DataError: the source or ``map`` returned something else than arrays ``[N, ...]``.
        """
        positions = np.asarray(positions, np.int64)
        batch = self.source.gather(self.indices(positions))
        _check_batch(batch, len(positions), f"{type(self.source).__name__}.gather")
        if self.map is not None:
            batch = self.map(batch, positions)
            _check_batch(batch, len(positions), "map")
        return batch

    def at(self, position: int) -> Batch:
        """Return the batch ``[B, ...]`` that begins at a global position, on the host."""
        return self.gather(np.arange(position, position + self.batch_size, dtype=np.int64))

    def take(self, position: int, count: int) -> Batch:
        """Return ``count`` batches from a global position, ``[count, B, ...]``, on the host."""
        size = self.batch_size
        flat = self.gather(np.arange(position, position + count * size, dtype=np.int64))
        return {name: value.reshape(count, size, *value.shape[1:]) for name, value in flat.items()}

    def __iter__(self) -> Iterator[Batch]:
        """Yield host batches ``[B, ...]`` from ``position`` on, forever, without a thread."""
        for group in self._groups(itertools.repeat(None)):
            yield from group

    def feed(
        self,
        sizes: Iterable[int | None],
        depth: int = 2,
        place: Callable[[Batch], Any] | None = None,
        threaded: bool | None = None,
        rows: np.ndarray | None = None,
    ) -> Feed:
        """Prepare batches from ``position`` on ahead of their use; one for each of ``sizes``.

        ``None`` stands for one batch ``[B, ...]``, an integer ``k`` for ``k`` consecutive batches
        stacked ``[k, B, ...]``. Small batches are gathered many at a time and then sliced.

        Law: the elements are those of :meth:`at` and :meth:`take`, bitwise, whatever ``depth``.

        Args:
          sizes: read ahead, in the thread.
          depth: how many gathers to be ahead: elements, or groups of small ones (see
            :class:`fnml.data.Feed`).
          place: puts an element on devices, in the thread. By default
            :func:`jax.device_put`; on CPU nothing, since there ``jit`` takes NumPy arrays
            faster than a second thread could hand them over.
          threaded: whether a thread does it; by default it does, but on CPU only once a batch
            took longer than half a millisecond: two threads share Python, and quick batches are
            gathered while the device works in any case.
          rows: which examples of each batch to read, int64 ``[R]``; by default all ``B`` of them.

        Raises:
          DataError: ``depth`` is below 1; from the iterator, a size is no positive integer.
          Exception: from the iterator, whatever the source or ``map`` raised, with a note that
            names the examples.

        >>> import numpy as np
        >>> from fnml.data import ArraySource
        >>> batches = Batches(ArraySource({"x": np.arange(8)}), batch_size=2, shuffle=False)
        >>> with batches.feed([None, 2, None]) as feed:
        ...     [np.asarray(element["x"]).tolist() for element in feed]
        [[0, 1], [[2, 3], [4, 5]], [6, 7]]
        """
        on_cpu = jax.default_backend() == "cpu"
        if place is None and not on_cpu:
            place = jax.device_put
        if threaded is None and not on_cpu:
            threaded = True
        return Feed(self._groups(sizes, place, rows), depth, threaded)

    def _groups(
        self,
        sizes: Iterable[int | None],
        place: Callable[[Batch], Any] | None = None,
        rows: np.ndarray | None = None,
    ) -> Iterator[list[Any]]:
        size = self.batch_size
        return groups(self.gather, self.indices, self.position, size, sizes, place, rows)

    @property
    def steps_per_epoch(self) -> float:
        """Batches in one epoch; a fraction where batches straddle epochs."""
        return len(self.source) / self.batch_size

    def steps(self, epochs: float) -> int:
        """Return the number of batches that cover ``epochs``, rounded up.

        >>> import numpy as np
        >>> from fnml.data import ArraySource
        >>> Batches(ArraySource({"x": np.arange(10)}), batch_size=4).steps(2)
        5
        """
        # The margin keeps 0.1 epochs of 1,000 examples from becoming 100.00000000000001.
        return math.ceil(epochs * len(self.source) / self.batch_size - 1e-9)

    def epochs(self, steps: int) -> float:
        """Return the epochs that ``steps`` batches from position 0 cover."""
        return steps * self.batch_size / len(self.source)

    def state(self, batches_done: int = 0) -> dict[str, Any]:
        """Return where the stream stands after ``batches_done`` batches, as plain JSON values.

        ``map`` is code and not part of it: resume with the same one.
        """
        return {
            "version": _VERSION,
            "position": self.position + int(batches_done) * self.batch_size,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": bool(self.shuffle),
            "length": len(self.source),
            "fingerprint": self.source.fingerprint,
        }

    def resume(self, state: Mapping[str, Any]) -> "Batches":
        """Return this stream at the position of a saved state.

        Law: ``batches.resume(batches.state(k))`` goes on as ``batches`` does after ``k`` batches.

        Raises:
          DataError: a field is missing or differs from this stream's; each one is listed.

        >>> import numpy as np
        >>> from fnml.data import ArraySource
        >>> batches = Batches(ArraySource({"x": np.arange(8)}), batch_size=3)
        >>> batches.resume(batches.state(2)).position
        6
        """
        cures = {
            "version": "it was written by another version of fnml: resume with that one",
            "batch_size": "resume with the same batch size",
            "seed": "resume with the same seed",
            "shuffle": "resume with the same setting",
            "length": "the data has another number of examples: resume with the same data",
            "fingerprint": "the data has other content: resume with the same data",
        }
        expected = self.state()
        faults = [
            f"{name}: the state has {state.get(name, 'no such field')!r}, "
            f"this stream {expected[name]!r}: {cure}"
            for name, cure in cures.items()
            if name not in state or state[name] != expected[name]
        ]
        position = state.get("position")
        if not _is_int(position) or not 0 <= int(position) <= _MAX_POSITION:  # type: ignore[arg-type]
            faults.append(
                f"position: the state has {position!r}: expected the number of examples seen"
            )
        if faults:
            raise DataError(
                "the saved data state does not belong to this stream:\n"
                + "\n".join(faults)
                + "\nTo go on with other data on purpose, set Batches(..., position=...) yourself."
            )
        return replace(self, position=int(position))  # type: ignore[arg-type]


def _check_batch(batch: Any, count: int, what: str) -> None:
    if not isinstance(batch, dict) or not batch:
        raise DataError(f"{what} returned {type(batch).__name__}: expected a dict of arrays")
    shapes = {name: getattr(value, "shape", None) for name, value in batch.items()}
    faults = [
        f"{name!r} has shape {shape}"
        for name, shape in shapes.items()
        if not shape or shape[0] != count
    ]
    if faults:
        raise DataError(
            f"{what} was asked for {count} examples, but returned "
            f"{', '.join(faults)}: every field needs a leading axis of {count}"
        )
