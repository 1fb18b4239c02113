"""What fit reads of the device: each step's metrics once, when a row is due, and nothing else.

``jax.transfer_guard`` lets a CPU's arrays pass, which are read without a copy, so reads are counted:
those by an array's own methods, and those by NumPy's ``asarray`` and ``array``. Going through an
array as an iterator or a ``memoryview`` would not be seen.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fit_runs import BATCHES, STEP, Memory, start

from fnml.train import fit


@pytest.fixture
def reads(monkeypatch) -> list[tuple[int, ...]]:
    """Return a list that gets the shape of every array that is read."""
    shapes = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(x, *args, **options):
            if isinstance(x, jax.Array):
                shapes.append(x.shape)
            return function(x, *args, **options)

        return call

    array = type(jnp.zeros(()))
    monkeypatch.setattr(array, "_value", property(counted(array._value.__get__)))
    monkeypatch.setattr(np, "asarray", counted(np.asarray))
    monkeypatch.setattr(np, "array", counted(np.array))
    return shapes


READERS = {
    "float": float,
    "bool": bool,
    "text": str,
    "item": lambda x: x.item(),
    "list": lambda x: x.tolist(),
    "device_get": jax.device_get,
    "asarray": lambda x: np.asarray(x),
    "array": lambda x: np.array(x),
}


@pytest.mark.parametrize("name", READERS)
def test_these_ways_to_read_are_seen(name, reads):
    x = jnp.float32(3) + 1
    READERS[name](x)
    assert reads == [()]


# A row for every 8 steps is written once a later step, or block of steps, is at work.
EXPECTED = {1: ([0] * 9 + [8] * 8 + [16] * 3, [(4,)] * 20), 4: ([0] * 12 + [2] * 8, [(4, 4)] * 5)}


@pytest.mark.parametrize("fuse", EXPECTED)
def test_a_step_reads_nothing_that_is_not_in_a_row(fuse, reads):
    before, memory = [], Memory()

    def batches():
        for batch in BATCHES:
            before.append(len(reads))
            yield batch

    fit(STEP, start(), batches(), steps=20, fuse=fuse, log_every=8, sinks=[memory])
    assert [row.step for row in memory.rows] == [8, 16, 20]
    # At the start the number of steps done is read. A step's metrics, two means, are one array.
    drawn, packed = EXPECTED[fuse]
    assert reads[:1] == [()] and reads[1:] == packed
    assert [count - 1 for count in before] == drawn
