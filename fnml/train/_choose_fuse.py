"""How many steps go into one dispatch: measured, where a measurement pays."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from fnml.train._feed import place, stack

PyTree = Any
_MOST = 32
_MOST_BYTES = 64 << 20  # of batches waiting to go into one dispatch
_SHARE = 0.1  # of the time left, what measuring may take
_ROUNDS = 3
_WORTH_IT = 1.02


class Choice(NamedTuple):
    """How many steps to run in one dispatch, the program that does, and why, in words."""

    steps: int
    run: Any
    reason: str


def choose_fuse(
    single: Any,
    fused: Callable[[int], Any],
    live: PyTree,
    batch: PyTree,
    *,
    most: int,
    steps: int,
    compile_seconds: float,
) -> Choice:
    """Run copies of a state on by single steps and by fused ones, and choose the faster.

    The choice changes no result: where the two ways end in different bits, it is single steps.

    Args:
      single: ``single(live, batch) -> (live, packed)``, compiled; it donates its first argument.
      fused: makes ``run(live, batches, steps) -> (live, packed)`` for so many batches.
      live: the state, which is copied twice.
      batch: the batch that all steps are tried with.
      most: the most steps to fuse.
      steps: how many are left to do.
      compile_seconds: what compiling ``single`` took, and ``fused`` will take about again.
    """
    if jax.process_count() > 1:
        return Choice(1, single, "fuse: 1, as several processes might not agree on a measurement")
    one, seconds = _timed(lambda: single(_copied(live), batch)[0])
    one, seconds = _timed(lambda: single(one, batch)[0])
    size = sum(np.asarray(x).nbytes for x in jax.tree.leaves(batch))
    count = min(_MOST, most, _MOST_BYTES // max(size, 1))
    if count < 2:
        return Choice(1, single, "fuse: 1, as no two steps fit between what is due")
    if compile_seconds + 3 * _ROUNDS * count * seconds > _SHARE * steps * seconds:
        return Choice(1, single, f"fuse: 1, as the {steps} steps left are too few to measure for")

    def by_ones(live: PyTree) -> PyTree:
        for _ in range(count):
            live, _ = single(live, batch)
        return live

    run, block = fused(count), place(stack([batch] * count))
    many, _ = _timed(lambda: run(_copied(live), block, count)[0])
    one = by_ones(_copied(live))
    if not _equal(one, many):
        return Choice(1, single, "fuse: 1, as this step has other bits in a fused loop")
    ratios = []
    for _ in range(_ROUNDS):
        one, slow = _timed(lambda: by_ones(one))  # noqa: B023 (called at once)
        many, fast = _timed(lambda: run(many, block, count)[0])  # noqa: B023
        ratios.append(slow / fast)
    gain = statistics.median(ratios)
    if gain < _WORTH_IT:
        return Choice(
            1, single, f"fuse: 1, as {count} in one dispatch are {gain:.2f} times as fast"
        )
    return Choice(count, run, f"fuse: {count}, which is {gain:.2f} times as fast as single steps")


def _timed(function: Callable[[], PyTree]) -> tuple[PyTree, float]:
    began = time.perf_counter()
    out = jax.block_until_ready(function())
    return out, time.perf_counter() - began


def _copied(live: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.copy(), live)


def _equal(a: PyTree, b: PyTree) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)
