"""Let contestants take turns in one process; the benchmarks share it."""

import time
from collections.abc import Callable
from typing import Any

import jax


def turns(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Time each function once a round, in alternating order."""
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds):
        for name in list(functions) if turn % 2 else list(functions)[::-1]:
            began = time.perf_counter()
            jax.block_until_ready(functions[name]())
            times[name].append(time.perf_counter() - began)
    return times
