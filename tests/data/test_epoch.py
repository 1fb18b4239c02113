"""One pass for evaluation: every example counts once, in one shape."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnml.core import DataError
from fnml.data import ArraySource, epoch


@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 50), batch_size=st.integers(1, 120))
def test_every_example_counts_once_in_order(n, batch_size):
    source = ArraySource({"i": np.arange(n), "x": np.arange(3.0 * n).reshape(n, 3)})
    batches = list(epoch(source, batch_size))
    assert len(batches) == -(-n // batch_size)
    for batch in batches:
        assert batch["i"].shape == batch["mask"].shape == (batch_size,)
        assert batch["x"].shape == (batch_size, 3)
        assert batch["mask"].dtype == np.float32
        assert np.array_equal(batch["x"][:, 0], 3.0 * batch["i"])
    seen = np.concatenate([batch["i"][batch["mask"] == 1] for batch in batches])
    assert np.array_equal(seen, np.arange(n))
    assert sum(float(batch["mask"].sum()) for batch in batches) == n


def test_refusals():
    source = ArraySource({"mask": np.ones(4)})
    with pytest.raises(DataError, match="field 'mask'"):
        next(epoch(source, 2))
    with pytest.raises(DataError, match="batch_size is 0"):
        epoch(ArraySource({"x": np.ones(4)}), 0)
