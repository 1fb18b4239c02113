"""One pass over a source, for evaluation."""

from collections.abc import Iterator

import numpy as np

from fnml.core import DataError
from fnml.data._source import Batch, Source, check_source


def epoch(source: Source, batch_size: int) -> Iterator[Batch]:
    """Yield every example once, in order, in host batches ``[B, ...]`` of one shape.

    Each batch has a field ``"mask"``, float32 ``[B]``: 1 for an example, 0 for the padding that
    fills the last batch (copies of valid examples, so that nothing non-finite is computed).

    Law: the masks sum to ``len(source)``, and the unmasked examples are
    ``source.gather(arange(len(source)))``.

    Raises:
      DataError: the source is empty or has a field ``"mask"``, or ``batch_size`` is below 1.

    >>> import numpy as np
    >>> from fnml.data import ArraySource
    >>> *_, last = epoch(ArraySource({"x": np.arange(5)}), batch_size=3)
    >>> last["x"].tolist(), last["mask"].tolist()
    ([3, 4, 0], [1.0, 1.0, 0.0])
    """
    length = check_source(source)
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}: it has to be at least 1")

    def batches() -> Iterator[Batch]:
        for start in range(0, length, batch_size):
            positions = np.arange(start, start + batch_size, dtype=np.int64)
            batch = source.gather(positions % length)
            if "mask" in batch:
                raise DataError(
                    f"the source {type(source).__name__} has a field 'mask', which epoch() "
                    f"would overwrite (it marks padding): rename the source's field"
                )
            yield {**batch, "mask": (positions < length).astype(np.float32)}

    return batches()
