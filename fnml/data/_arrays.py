"""Arrays in memory as a source."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fnml.core import DataError
from fnml.data._fingerprint import fingerprint
from fnml.data._source import Batch, check_indices


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Examples from named arrays ``[N, ...]``; memory-mapped arrays stay on disk.

    Dtypes are kept: normalise on the device, where it is free. The arrays are not copied, so
    leave them unchanged while the source is in use.

    Raises:
      DataError: no array, no example, an array without a leading axis, unequal leading lengths,
        or a dtype of Python objects; every fault is listed.

    >>> import numpy as np
    >>> source = ArraySource({"x": np.arange(6).reshape(3, 2), "y": np.array([7, 8, 9])})
    >>> len(source), source.gather(np.array([2, 0]))["y"].tolist()
    (3, [9, 7])
    """

    arrays: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        arrays: dict[str, np.ndarray] = {}
        faults = [] if self.arrays else ["there is no array: give at least one"]
        for name, value in self.arrays.items():
            try:
                # asarray also drops the memmap subclass, whose indexing is slow.
                array = np.asarray(value)
            except ValueError as error:
                faults.append(f"{name!r} is not an array: {error}")
                continue
            if array.dtype.hasobject:
                faults.append(f"{name!r} has dtype {array.dtype}: convert it to numbers first")
            elif array.ndim == 0:
                faults.append(f"{name!r} is a scalar: the leading axis has to count examples")
            elif len(array) == 0:
                faults.append(f"{name!r} has shape {array.shape}: it holds no example")
            arrays[name] = array
        lengths = {name: len(array) for name, array in arrays.items() if array.ndim}
        if len(set(lengths.values())) > 1:
            faults.append(
                "the leading lengths differ: "
                + ", ".join(f"{name!r} has {length}" for name, length in lengths.items())
                + ": each array needs one entry for each example"
            )
        if faults:
            raise DataError("these arrays cannot be a source:\n" + "\n".join(faults))
        object.__setattr__(self, "arrays", arrays)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def gather(self, indices: np.ndarray) -> Batch:
        """Copy the examples ``indices`` into new arrays ``[N, ...]``.

        Raises:
          DataError: an index is out of range.
        """
        rows = check_indices(indices, len(self), "ArraySource")
        return {name: array.take(rows, axis=0) for name, array in self.arrays.items()}

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of names, dtypes, shapes and content; of large arrays, of 256 samples."""
        return fingerprint(self.arrays)
