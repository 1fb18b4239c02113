"""Bring batches to the step: prefetched where the source can, one by one where not."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from fnml.core import ShapeError

PyTree = Any
Sizes = Callable[[], Iterator[int | None]]


class Feed:
    """Yield ``(size, batch)``: ``size`` is ``None`` for one batch ``[B, ...]``, else how many of
    the ``fuse`` batches stacked along the leading axis are real."""

    def __init__(self, elements: Iterator[tuple[int | None, PyTree]], source: Any):
        self._elements = elements
        self._source = source
        self._waited = 0.0

    def __next__(self) -> tuple[int | None, PyTree]:
        began = time.perf_counter()
        element = next(self._elements)
        self._waited += time.perf_counter() - began
        return element

    @property
    def waited(self) -> float:
        """Seconds spent waiting for data."""
        return self._waited

    def close(self) -> None:
        """Stop the source's thread, if it has one."""
        if hasattr(self._source, "close"):
            self._source.close()


def open_feed(batches: Iterable[PyTree], fuse: int, sizes: Sizes) -> Feed:
    """Open ``batches`` for reading in blocks.

    What has a method ``feed(sizes, place=...)``, as :class:`fnml.data.Batches` does, stacks and
    prefetches blocks itself; anything else is iterated and stacked here.
    """
    if hasattr(batches, "feed"):
        if fuse == 1:
            source = batches.feed(sizes())
        else:
            # What puts its parts on devices itself takes them from the host.
            onto = (lambda block: block) if hasattr(batches, "sharding") else place
            source = batches.feed(sizes(), place=lambda block: onto(_pad(block, fuse)))
        return Feed(zip(sizes(), source, strict=False), source)
    return Feed(_stacked(iter(batches), fuse, sizes()), None)


def at(source: Any, done: int) -> Any:
    """Return a source for :func:`open_feed` as it stands after ``done`` of its batches.

    An iterator stands there already; a source that prefetches is taken up from its saved state.
    """
    return source.resume(source.state(done)) if hasattr(source, "feed") else source


def reopens(source: Any) -> bool:
    """Tell whether :func:`at` can take a source up in the middle."""
    return not hasattr(source, "feed") or hasattr(source, "resume")


def stack(batches: Sequence[PyTree]) -> PyTree:
    """Stack batches on the host, along a new leading axis."""
    return jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *batches)


def place(block: PyTree) -> PyTree:
    """Put a block on the device, but leave it to ``jit`` on CPU, which takes NumPy arrays fast."""
    return block if jax.default_backend() == "cpu" else jax.device_put(block)


def _pad(block: PyTree, count: int) -> PyTree:
    """Lengthen a short block to the compiled size; the steps beyond its own are not run."""

    def pad(x: np.ndarray) -> np.ndarray:
        missing = count - x.shape[0]
        return np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) if missing else x

    return jax.tree.map(pad, block)


def _stacked(
    batches: Iterator[PyTree], fuse: int, sizes: Iterator[int | None]
) -> Iterator[tuple[int | None, PyTree]]:
    for size in sizes:
        if size is None:
            batch = next(batches, None)
            if batch is None:
                return
            yield None, batch
            continue
        block = [batch for _, batch in zip(range(size), batches, strict=False)]
        if not block:
            return
        shapes = {tuple(np.shape(x) for x in jax.tree.leaves(batch)) for batch in block}
        if len(shapes) > 1:
            raise ShapeError(
                f"batches of unequal shapes cannot be fused, got {sorted(shapes)}: drop the "
                "shorter ones, or use fuse=1"
            )
        yield len(block), _pad(stack(block), fuse)
