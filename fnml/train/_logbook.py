"""Turn the metrics of every step into rows, without reading the device more than needed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnml.core import Mean, NonFiniteError

Totals = dict[str, tuple[float, float]]


def means(metrics: Mapping[str, Mean]) -> dict[str, float]:
    """Read metrics from the device as numbers; those that nothing counted for are left out.

    >>> import jax.numpy as jnp
    >>> means({"loss": Mean(jnp.float32(3), jnp.float32(2))})
    {'loss': 1.5}
    """
    host = jax.device_get({name: (mean.total, mean.weight) for name, mean in metrics.items()})
    return {name: float(t) / float(w) for name, (t, w) in host.items() if float(w) != 0}


def to_json(x: float) -> float | str:
    """Return what JSON can hold: it has no word for NaN and infinities; ``float`` reads both."""
    return x if math.isfinite(x) else str(x)


def pack(metrics: Mapping[str, Mean]) -> jax.Array:
    """Lay one step's metrics out as one float32 array ``[2 M]``: all totals, then all weights.

    One array a step costs one output buffer and one transfer, however many metrics there are.
    """
    values = [metrics[name] for name in sorted(metrics)]
    parts = [mean.total for mean in values] + [mean.weight for mean in values]
    return jnp.stack([part.astype(jnp.float32) for part in parts])


class Logbook:
    """Collect per-step metrics on the device; read them when a row is due.

    A row at step ``s`` holds the merged means of the steps since the row before. Steps recorded
    but not yet in a row can be saved with a checkpoint (:meth:`pending`) and given back, so a
    resumed run writes the very same rows.

    Args:
      names: the metrics' names.
      every: a row is due at each multiple of this many steps.
      step: the number of steps done so far.
      pending: what :meth:`pending` returned at that step.
    """

    def __init__(
        self,
        names: Sequence[str],
        every: int,
        step: int = 0,
        pending: Sequence[Mapping[str, Any]] = (),
    ):
        self._names = sorted(names)
        self._every = every
        self._read = step
        self._recorded = step
        self._device: list[tuple[jax.Array, int | None]] = []
        self._pending: list[Totals] = [
            {name: (float(t), float(w)) for name, (t, w) in entry.items()} for entry in pending
        ]

    def record(self, packed: jax.Array, steps: int | None = None) -> None:
        """Add one step's packed metrics ``[2 M]``, or the first ``steps`` rows of ``[k, 2 M]``."""
        self._device.append((packed, steps))
        self._recorded += 1 if steps is None else steps

    @property
    def due(self) -> bool:
        """Whether a row can be written that could not before."""
        return self._recorded // self._every > self._read // self._every

    def rows(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Read everything recorded; yield the ``(step, means)`` that became complete.

        Raises:
          NonFiniteError: the loss of a step is NaN or infinite; the message names the step.
        """
        recorded, self._device = self._device, []
        # Many small arrays: one by one this is ten times faster than a jax.device_get of all.
        host = [np.asarray(packed) for packed, _ in recorded]
        for packed, (_, count) in zip(host, recorded, strict=True):
            for line in packed.reshape(-1, packed.shape[-1])[:count].tolist():
                self._read += 1
                totals, weights = line[: len(self._names)], line[len(self._names) :]
                entry = dict(zip(self._names, zip(totals, weights, strict=True), strict=True))
                if not math.isfinite(entry["loss"][0]):
                    raise NonFiniteError(
                        f"the loss of step {self._read} is {entry['loss'][0]}. Lower the learning "
                        "rate, clip the gradients, or look for a division by zero or a log of "
                        "zero in the loss; the last good checkpoint is kept"
                    )
                self._pending.append(entry)
                if self._read % self._every == 0:
                    merged, self._pending = _merge(self._pending), []
                    yield self._read, merged

    def rest(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield a last, shorter row for the steps since the row before, if there are any."""
        if self._pending:
            merged, self._pending = _merge(self._pending), []
            yield self._read, merged

    def pending(self) -> list[dict[str, list[float | str]]]:
        """Return the steps read but not yet in a row, for JSON."""
        return [
            {name: [to_json(t), to_json(w)] for name, (t, w) in entry.items()}
            for entry in self._pending
        ]


def _merge(entries: Sequence[Totals]) -> dict[str, float]:
    """Merge the steps' means by weight, in float64 and in the order of the steps."""
    sums: dict[str, tuple[float, float]] = {}
    for entry in entries:
        for name, (total, weight) in entry.items():
            t, w = sums.get(name, (0.0, 0.0))
            sums[name] = (t + total, w + weight)
    return {name: t / w for name, (t, w) in sums.items() if w != 0}
