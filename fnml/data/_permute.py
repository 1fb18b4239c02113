"""Shuffle without a list: a keyed permutation, evaluated where it is asked for."""

import functools
import math
from typing import Any

import numpy as np

from fnml.core import DataError
from fnml.data._source import check_indices

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_A, _B = (np.uint64(factor) for factor in _MIX)
_HALF = np.uint64(32)
_MAX_LENGTH = 1 << 62
# Measured: fewer rounds bias the order of 600 examples.
_ROUNDS = 8
# Up to this length sorting random numbers is faster than the rounds, and a table is 128 KiB.
_TABLE = 1 << 14
_TINY = 64


def mix(value: int) -> int:
    """Map 64 bits to 64 well-mixed bits, one to one (the finalizer of SplitMix64)."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * _MIX[0]) & _MASK
    value = ((value ^ (value >> 27)) * _MIX[1]) & _MASK
    return value ^ (value >> 31)


def mix_array(values: np.ndarray) -> np.ndarray:
    """Apply :func:`mix` to each element of a uint64 array."""
    values = (values ^ (values >> np.uint64(30))) * _A
    values = (values ^ (values >> np.uint64(27))) * _B
    return values ^ (values >> np.uint64(31))


def random_bits(key: int, positions: np.ndarray) -> np.ndarray:
    """Draw 64 random bits for each position, from nothing but ``(key, position)``.

    Augmentation keyed this way gives the same example the same draw after a resume, and under
    every batch size; use another key for each kind of draw.

    >>> import numpy as np
    >>> flip = random_bits(7, np.arange(1000)) % np.uint64(2)
    >>> 450 < int(flip.sum()) < 550
    True
    """
    counters = np.asarray(positions).astype(np.uint64) * np.uint64(_GOLDEN)
    return mix_array(mix_array(counters + np.uint64(mix(key + _GOLDEN))))


def _round(
    side: np.ndarray, other: np.ndarray, key: np.ndarray, size: np.uint64, bits: np.ndarray
) -> None:
    """Add a keyed hash of ``other`` to ``side``, modulo ``size``, in place."""
    np.bitwise_xor(other, key, out=bits)
    bits *= _A
    bits ^= bits >> _HALF
    bits *= _B
    # The upper half times size, shifted down, is uniform on range(size) without a division.
    bits >>= _HALF
    bits *= size
    bits >>= _HALF
    side += bits
    # Below size the difference wraps around to a huge number, so the minimum is the remainder.
    np.subtract(side, size, out=bits)
    np.minimum(side, bits, out=side)


def _shuffle(
    values: np.ndarray, rows: np.uint64, columns: np.uint64, keys: np.ndarray
) -> np.ndarray:
    """Permute ``range(rows * columns)``: each round is one to one, whatever its hash."""
    left = values // columns
    right = values - left * columns
    bits = np.empty_like(values)
    for first in range(0, len(keys), 2):
        _round(left, right, keys[first], rows, bits)
        _round(right, left, keys[first + 1], columns, bits)
    left *= columns
    left += right
    return left


def _tables(n: int, keys: np.ndarray) -> np.ndarray:
    """Return the permutation of ``range(n)`` for each key: ``[E, 1]`` to int64 ``[E, n]``.

    The mix is one to one, so the numbers sorted are distinct and the order is theirs alone.
    """
    counters = np.arange(n, dtype=np.uint64) * np.uint64(_GOLDEN)
    return np.argsort(mix_array(counters + mix_array(keys)), axis=1)


@functools.lru_cache(maxsize=8)
def _table(n: int, key: int) -> np.ndarray:
    table = _tables(n, np.array([[key]], np.uint64))[0]
    table.setflags(write=False)
    return table


def _look_up(indices: np.ndarray, n: int, key: int | np.ndarray) -> np.ndarray:
    if not isinstance(key, np.ndarray):
        return _table(n, key & _MASK)[indices]
    key = key.astype(np.uint64)
    if n <= _TINY:
        keys, which = np.unique(key, return_inverse=True)
        return _tables(n, keys[:, None])[which, indices]
    # Neighbours mostly share a key: a stream passes from one epoch to the next now and then.
    starts = np.flatnonzero(key[1:] != key[:-1]) + 1
    runs = np.split(indices, starts)
    return np.concatenate(
        [_table(n, one)[run] for one, run in zip(key[[0, *starts]].tolist(), runs, strict=True)]
    )


def permute(indices: Any, n: int, key: int | np.ndarray) -> np.ndarray:
    """Return where a keyed permutation of ``range(n)`` sends ``indices``; int64 ``[N]``.

    Up to 16,384 it is the order of ``n`` random numbers. Beyond, nothing of size ``n`` is ever
    made: an unbalanced Feistel network permutes a grid of rows times columns, with less than
    ``sqrt(n) + 1`` cells more than ``n``; what lands outside ``range(n)`` is sent through again,
    until it lands inside (cycle walking).

    Law: for each ``key``, ``permute(arange(n), n, key)`` holds each of ``range(n)`` once.

    Args:
      indices: integers ``[N]`` in ``range(n)``.
      n: up to ``2**62``.
      key: one integer, or a uint64 array ``[N]`` with a key for each index.

    Raises:
      DataError: an index is out of range, or ``n`` is.

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains" (2002): generalized
    Feistel, and cycle walking.

    >>> import numpy as np
    >>> sorted(permute(np.arange(5), 5, key=1).tolist())
    [0, 1, 2, 3, 4]
    >>> permute(np.array([0, 1, 2**40 - 1]), 2**40, key=1).shape
    (3,)
    """
    if not 1 <= n <= _MAX_LENGTH:
        raise DataError(f"permute: n is {n}: expected 1 to 2**62")
    checked = check_indices(indices, n, "permute")
    if n <= _TABLE and checked.size:
        return _look_up(checked, n, key)
    values = checked.astype(np.uint64)
    if isinstance(key, np.ndarray):
        offsets = np.arange(1, _ROUNDS + 1, dtype=np.uint64)[:, None] * np.uint64(_GOLDEN)
        keys = mix_array(key.astype(np.uint64) + offsets)
    else:
        keys = np.array([[mix(key + (i + 1) * _GOLDEN)] for i in range(_ROUNDS)], np.uint64)
    side = math.isqrt(n - 1) + 1
    rows, columns = np.uint64(side), np.uint64(-(-n // side))
    values = _shuffle(values, rows, columns, keys)
    while (outside := np.flatnonzero(values >= np.uint64(n))).size:
        some = keys if keys.shape[1] == 1 else keys[:, outside]
        values[outside] = _shuffle(values[outside], rows, columns, some)
    return values.astype(np.int64)
