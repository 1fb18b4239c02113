"""Turn the metrics of every step into rows, without reading the device more than needed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnml.core import Mean, NonFiniteError


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
        self._loss = self._names.index("loss")
        self._every = every
        self._read = step
        self._recorded = step
        self._newest = 0
        self._device: list[tuple[jax.Array, int | None]] = []
        # As `pack` lays steps out: [steps, 2 M].
        self._pending = [
            np.array([[float(entry[name][i]) for i in (0, 1) for name in self._names]], np.float32)
            for entry in pending
        ]

    def record(self, packed: jax.Array, steps: int | None = None) -> None:
        """Add one step's packed metrics ``[2 M]``, or the first ``steps`` rows of ``[k, 2 M]``."""
        self._device.append((packed, steps))
        self._newest = 1 if steps is None else steps
        self._recorded += self._newest

    @property
    def due(self) -> bool:
        """Whether a row can be written without waiting for what was recorded last.

        The device is then still at work while the row is read.
        """
        return (self._recorded - self._newest) // self._every > self._read // self._every

    def rows(self, newest: bool = True) -> Iterator[tuple[int, dict[str, float]]]:
        """Read what was recorded; yield the ``(step, means)`` that became complete.

        Args:
          newest: whether to wait for what was recorded last.

        Raises:
          NonFiniteError: the loss of a step is NaN or infinite; the message names the step.
        """
        count = len(self._device) - (not newest)
        recorded, self._device = self._device[:count], self._device[max(count, 0) :]
        if not recorded:
            return
        # Many small arrays: one by one this is ten times faster than a jax.device_get of all.
        host = [np.asarray(packed) for packed, _ in recorded]
        lines = np.concatenate(
            [x.reshape(-1, x.shape[-1])[:n] for x, (_, n) in zip(host, recorded, strict=True)]
        )
        faults = np.flatnonzero(~np.isfinite(lines[:, self._loss]))
        fine = int(faults[0]) if faults.size else len(lines)
        at = 0
        while at < fine:
            count = min(self._every - self._read % self._every, fine - at)
            self._pending.append(lines[at : at + count])
            self._read += count
            at += count
            if self._read % self._every == 0:
                yield self._read, self._merge()
        if faults.size:
            raise NonFiniteError(
                f"the loss of step {self._read + 1} is {lines[fine, self._loss]}. Lower the "
                "learning rate, clip the gradients, or look for a division by zero or a log of "
                "zero in the loss; the last good checkpoint is kept"
            )

    def rest(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield a last, shorter row for the steps since the row before, if there are any."""
        if self._pending:
            yield self._read, self._merge()

    def pending(self) -> list[dict[str, list[float | str]]]:
        """Return the steps read but not yet in a row, for JSON."""
        count = len(self._names)
        return [
            {
                name: [to_json(line[i]), to_json(line[count + i])]
                for i, name in enumerate(self._names)
            }
            for part in self._pending
            for line in part.tolist()
        ]

    def _merge(self) -> dict[str, float]:
        """Merge the pending steps' means by weight, in float64 and in the order of the steps."""
        lines, self._pending = np.concatenate(self._pending, dtype=np.float64), []
        with np.errstate(all="ignore"):
            totals, weights = np.split(np.add.accumulate(lines)[-1], 2)
        named = zip(self._names, totals.tolist(), weights.tolist(), strict=True)
        return {name: t / w for name, t, w in named if w != 0}
