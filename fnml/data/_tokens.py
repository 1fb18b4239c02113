"""A long array of tokens as a source of windows."""

import functools
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import numpy as np

from fnml.core import DataError
from fnml.data._fingerprint import fingerprint
from fnml.data._source import Batch, check_indices

_INT32 = np.iinfo(np.int32)


def _open_tokens(path: Path) -> np.ndarray:
    """Memory-map a ``.npy`` file; whatever is wrong with it becomes a DataError."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"{path}: the token file cannot be read ({error.strerror}): "
            f"write one with fnml.data.write_tokens"
        ) from error
    try:
        with path.open("rb") as file:
            major, _ = np.lib.format.read_magic(file)
            header = int.from_bytes(file.read(2 if major == 1 else 4), "little")
            if header > size:
                raise ValueError(f"its header claims {header} bytes")
        return np.asarray(np.lib.format.open_memmap(path, mode="r"))
    # A damaged header can fail anywhere in NumPy's parser, with almost any type.
    except Exception as error:
        raise DataError(
            f"{path}: not a readable .npy file, or a damaged one ({size} bytes on disk): {error}. "
            f"Write it again, for example with fnml.data.write_tokens"
        ) from error


@dataclass(frozen=True, eq=False)
class TokenSource:
    """Windows of a token array, or of a ``.npy`` file that stays on disk.

    Example ``i`` is ``tokens[i * stride : i * stride + window + 1]``: its first ``window`` tokens
    are the input, its last ``window`` the targets. With the default stride, ``window``, every
    token but the first is a target once.

    Args:
      tokens: integers ``[N]``, or the path of a ``.npy`` file of them, which is memory-mapped
        (it must not shrink while in use).
      window: T, the length of an example.
      stride: the distance between two examples' beginnings.

    Raises:
      DataError: the file is missing or damaged, the array is not one-dimensional integers or
        shorter than ``window + 1``, or a number is below 1; every fault is listed.

    >>> import numpy as np
    >>> source = TokenSource(np.arange(10, dtype=np.uint16), window=4)
    >>> len(source), source.gather(np.array([1]))["targets"].tolist()
    (2, [[5, 6, 7, 8]])
    """

    tokens: np.ndarray | str | PathLike[str]
    window: int
    stride: int | None = None
    _windows: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        stride = self.window if self.stride is None else self.stride
        if isinstance(self.tokens, str | PathLike):
            path = Path(self.tokens)
            where, tokens = str(path), _open_tokens(path)
        else:
            where, tokens = "TokenSource", np.asarray(self.tokens)
        faults = [
            f"{name} is {value}: it has to be at least 1"
            for name, value in {"window": self.window, "stride": stride}.items()
            if value < 1
        ]
        if tokens.dtype.kind not in "iu":
            faults.append(f"the dtype is {tokens.dtype}: tokens are integers, such as uint16")
        if tokens.ndim != 1:
            faults.append(f"the shape is {tokens.shape}: tokens are one-dimensional; ravel them")
        elif not faults and len(tokens) < self.window + 1:
            faults.append(
                f"it holds {len(tokens)} tokens, but one example takes {self.window + 1} "
                f"(window {self.window} and the last target): use a shorter window or more text"
            )
        if faults:
            raise DataError(f"{where}: cannot be used as tokens:\n" + "\n".join(faults))
        windows = np.lib.stride_tricks.sliding_window_view(tokens, self.window + 1)[::stride]
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "stride", stride)
        object.__setattr__(self, "_windows", windows)

    def __len__(self) -> int:
        return len(self._windows)

    def gather(self, indices: np.ndarray) -> Batch:
        """Copy windows: ``{"tokens": int32 [N, T], "targets": int32 [N, T]}``.

        Raises:
          DataError: an index is out of range, or a token does not fit into int32.
        """
        rows = check_indices(indices, len(self), "TokenSource")
        block = self._windows[rows]
        info = np.iinfo(block.dtype)
        if (info.min < _INT32.min or info.max > _INT32.max) and block.size:
            wrong = (block < _INT32.min) | (block > _INT32.max)
            if wrong.any():
                row, column = (int(axis[0]) for axis in np.nonzero(wrong))
                offset = int(rows[row]) * int(self.stride or 1) + column
                raise DataError(
                    f"TokenSource: token {offset} is {block[row, column]}, which int32 cannot "
                    f"hold (example {rows[row]}): the file is damaged, or not of tokens"
                )
        return {
            "tokens": block[:, :-1].astype(np.int32, order="C"),
            "targets": block[:, 1:].astype(np.int32, order="C"),
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the tokens, window and stride; of a large file, of 256 samples."""
        tokens = np.asarray(self.tokens)
        return fingerprint({"tokens": tokens}, window=self.window, stride=self.stride or 0)
