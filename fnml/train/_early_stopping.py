"""Stop when the held-out metric no longer gets better."""

import math
from collections.abc import Callable
from typing import Literal

from fnml.core import ConfigError
from fnml.train._fit import Progress


def early_stopping(
    metric: str = "loss",
    *,
    patience: int = 3,
    min_delta: float = 0.0,
    mode: Literal["min", "max"] = "min",
) -> Callable[[Progress], str | None]:
    """Make a callback that stops the run after ``patience`` evaluations without improvement.

    It keeps nothing between calls: the evaluations so far, which checkpoints hold, decide. A
    resumed run therefore stops at the same step. NaN is never an improvement.

    Args:
      metric: a name among the evaluation's metrics.
      patience: how many evaluations in a row may fail to improve on the best.
      min_delta: by how much a metric has to beat the best to count.
      mode: whether lower or higher is better.

    Raises:
      ConfigError: ``patience`` is below 1, ``mode`` is unknown, or an evaluation has no such metric (when called).
    """
    if patience < 1:
        raise ConfigError(f"early_stopping needs a patience of at least 1, got {patience}")
    if mode not in ("min", "max"):
        raise ConfigError(f"early_stopping's mode is 'min' or 'max', got {mode!r}")
    sign = 1.0 if mode == "min" else -1.0

    def stop(progress: Progress) -> str | None:
        best, best_at = math.inf, -1
        for i, row in enumerate(progress.evals):
            if metric not in row.values:
                raise ConfigError(
                    f"early_stopping watches {metric!r}, but the evaluation gives "
                    f"{', '.join(sorted(row.values))}"
                )
            if sign * row.values[metric] < best - (min_delta if best_at >= 0 else 0.0):
                best, best_at = sign * row.values[metric], i
        waited = len(progress.evals) - 1 - best_at
        if waited < patience:
            return None
        if best_at < 0:
            return f"{metric} was never finite in {waited} evaluations"
        step = progress.evals[best_at].step
        return (
            f"{metric} is not better than {sign * best:.6g} at step {step} in {waited} evaluations"
        )

    return stop
