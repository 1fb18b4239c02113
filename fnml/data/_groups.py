"""Gather many small batches at once, and cut them apart."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from fnml.core import DataError
from fnml.data._source import Batch

_GROUP_BYTES = 1 << 20
_GROUP_SECONDS = 2e-3
_NAMED = 8

Size = int | None


def groups(
    gather: Callable[[np.ndarray], Batch],
    locate: Callable[[np.ndarray], np.ndarray],
    position: int,
    batch_size: int,
    sizes: Iterable[Size],
    place: Callable[[Batch], Any] | None = None,
    rows: np.ndarray | None = None,
) -> Iterator[list[Any]]:
    """Yield lists of consecutive elements; each list is one call of ``gather(positions)``.

    A list grows from one element to about a megabyte or two milliseconds of work, so neither a
    fast source's overhead nor a slow source's latency is felt. What is yielded does not depend
    on it, since ``gather`` does not depend on how positions are portioned. Of each batch, only the
    examples ``rows`` are gathered, by default all.

    Raises:
      DataError: an entry of ``sizes`` is neither ``None`` nor a positive integer.
      Exception: what ``gather`` raised, with a note that names the positions and, by
        ``locate(positions)``, the source's indices; the elements before it are yielded first.
    """
    entries = _checked(sizes)
    limit = 1
    rows = np.arange(batch_size, dtype=np.int64) if rows is None else rows
    while True:
        portion, fault = _read(entries, limit)
        total = sum(size or 1 for size in portion)
        starts = np.arange(position, position + total * batch_size, batch_size, dtype=np.int64)
        positions = (starts[:, None] + rows).reshape(-1)
        began = time.perf_counter()
        try:
            flat = gather(positions) if portion else {}
            elements = _cut(flat, portion, len(rows), place)
        except Exception as error:
            if len(portion) == 1:
                error.add_note(_whereabouts(gather, locate, positions))
                raise
            # Again, one element at a time: those before the fault are still good.
            for size in portion:
                yield from groups(gather, locate, position, batch_size, [size], place, rows)
                position += (size or 1) * batch_size
            limit = 1
        else:
            if portion:
                yield elements
            position += total * batch_size
            roof = _GROUP_BYTES * total // max(1, sum(value.nbytes for value in flat.values()))
            quick = time.perf_counter() - began < _GROUP_SECONDS
            limit = max(1, min(2 * limit, roof) if quick else limit // 2)
        if fault is not None:
            raise fault
        if not portion:
            return


def _checked(sizes: Iterable[Size]) -> Iterator[Size]:
    for number, size in enumerate(sizes):
        if size is None:
            yield None
            continue
        whole = isinstance(size, int | np.integer) and not isinstance(size, bool)
        if not (whole and size >= 1):
            raise DataError(
                f"sizes: entry {number} is {size!r}: expected None for one batch, or a positive "
                f"integer for that many batches stacked"
            )
        yield size


def _read(entries: Iterator[Size], limit: int) -> tuple[list[Size], Exception | None]:
    """Read entries until they stand for ``limit`` batches; also return what stopped it."""
    portion: list[Size] = []
    total = 0
    try:
        while total < limit:
            size = next(entries)
            portion.append(size)
            total += size or 1
    except StopIteration:
        pass
    except Exception as error:  # noqa: BLE001 (raised after the portion before it)
        return portion, error
    return portion, None


def _cut(
    flat: Batch, portion: list[Size], batch_size: int, place: Callable[[Batch], Any] | None
) -> list[Any]:
    """Cut a gathered portion into its elements; they are views of it."""
    elements: list[Any] = []
    start = 0
    for size in portion:
        stop = start + (size or 1) * batch_size
        element = {name: value[start:stop] for name, value in flat.items()}
        if size is not None:
            element = {
                name: value.reshape(size, batch_size, *value.shape[1:])
                for name, value in element.items()
            }
        elements.append(element if place is None else place(element))
        start = stop
    return elements


def _whereabouts(
    gather: Callable[[np.ndarray], Batch],
    locate: Callable[[np.ndarray], np.ndarray],
    positions: np.ndarray,
) -> str:
    """Halve the positions for as long as one half fails alone, and name what is left."""

    def fails(some: np.ndarray) -> bool:
        try:
            gather(some)
        except Exception:  # noqa: BLE001 (whether it fails is the question)
            return True
        return False

    while len(positions) > 1:
        halves = np.array_split(positions, 2)
        bad = next((half for half in halves if fails(half)), None)
        if bad is None:
            break
        positions = bad
    indices = locate(positions)
    named = ", ".join(str(index) for index in indices[:_NAMED])
    more = ", ..." if len(indices) > _NAMED else ""
    return (
        f"while reading the examples at global positions {positions[0]} to {positions[-1]} "
        f"(source indices {named}{more})"
    )
