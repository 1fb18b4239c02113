"""Batches of which each process reads its part."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from fnml.data._batches import Batches
from fnml.data._feed import Feed
from fnml.data._source import Batch


@dataclass(frozen=True, eq=False)
class Shared:
    """The same stream of batches in several processes, each of which reads what its devices need.

    Law: an element of :meth:`feed` is the global array of which ``batches.feed`` gives the host
    array: the same shape, the same bits. No process holds the whole of it, and nothing is sent.

    Args:
      batches: the whole stream, the same in every process.
      sharding: where the examples ``[B, ...]`` of a batch lie.

    >>> import numpy as np
    >>> from fnml.data import ArraySource
    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> batches = Batches(ArraySource({"x": np.arange(8)}), batch_size=4, shuffle=False)
    >>> shared = Shared(batches, NamedSharding(mesh, jax.P("data")))
    >>> with shared.feed([1, 2]) as feed:
    ...     [element["x"].tolist() for element in feed]
    [[[0, 1, 2, 3]], [[4, 5, 6, 7], [0, 1, 2, 3]]]
    """

    batches: Batches
    sharding: NamedSharding

    @property
    def rows(self) -> np.ndarray:
        """Which examples of each batch this process reads, int64 ``[R]``."""
        size = self.batches.batch_size
        parts = self.sharding.addressable_devices_indices_map((size,)).values()
        return np.unique(np.concatenate([np.arange(size)[part] for part in parts]))

    def feed(
        self,
        sizes: Iterable[int | None],
        depth: int = 2,
        place: Callable[[Batch], Batch] = lambda part: part,
        threaded: bool | None = None,
    ) -> Feed:
        """Prepare global batches ahead of their use; see :meth:`Batches.feed`.

        Args:
          sizes: as there, but either all ``None`` or none.
          depth: as there.
          place: ``place(part) -> part``, done to this process's part on the host.
          threaded: as there.
        """
        entries = iter(sizes)
        first = next(entries, None)
        spec = self.sharding.spec if first is None else jax.P(None, *self.sharding.spec)
        sharding = NamedSharding(self.sharding.mesh, spec)
        axis, size = int(first is not None), self.batches.batch_size

        def whole(part: Batch) -> dict[str, jax.Array]:
            def assemble(x: np.ndarray) -> jax.Array:
                shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
                return jax.make_array_from_process_local_data(sharding, x, shape)

            return {name: assemble(np.asarray(x)) for name, x in place(part).items()}

        again = itertools.chain([first], entries)
        return self.batches.feed(again, depth, whole, threaded, self.rows)

    def at(self, position: int) -> Batch:
        """Return a whole batch ``[B, ...]``, on the host; see :meth:`Batches.at`."""
        return self.batches.at(position)

    def state(self, batches_done: int = 0) -> dict[str, Any]:
        """Return where the stream stands; see :meth:`Batches.state`."""
        return self.batches.state(batches_done)
