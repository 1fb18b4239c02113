"""Which steps to keep."""

import math
from collections.abc import Mapping
from typing import Literal

Best = Literal["min", "max"]


def best_steps(metrics: Mapping[int, float | None], count: int, best: Best) -> list[int]:
    """Return up to ``count`` steps, the best first; of equal ones the earlier is better.

    A metric that is missing, NaN or infinite is never the best.

    >>> best_steps({1: 0.5, 2: float("nan"), 3: 0.5, 4: 0.4}, 2, "min")
    [4, 1]
    """
    sign = 1 if best == "min" else -1
    ranked = sorted(
        (sign * metric, step)
        for step, metric in metrics.items()
        if metric is not None and math.isfinite(metric)
    )
    return [step for _, step in ranked[:count]]


def kept_steps(
    metrics: Mapping[int, float | None], *, saved: int, keep_last: int, keep_best: int, best: Best
) -> set[int]:
    """Return the steps to keep after ``saved`` was: it, the last ones, and the best ones.

    ``saved`` stays even if later steps are there, as after a resume from an earlier one: it is the
    one step that is known to be whole.

    >>> sorted(kept_steps(dict.fromkeys([1, 2, 3]), saved=3, keep_last=2, keep_best=0, best="min"))
    [2, 3]
    """
    last = sorted(metrics)[-keep_last:] if keep_last else []
    return {saved, *last, *best_steps(metrics, keep_best, best)}
