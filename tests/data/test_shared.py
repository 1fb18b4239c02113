"""Each process reads what its devices need, and the whole is the batch that one would read."""

import jax
import numpy as np
import pytest

from fnml.data import ArraySource, Batches, Shared


@pytest.fixture
def batches():
    rng = np.random.default_rng(0)
    source = ArraySource({"x": rng.normal(size=(50, 3)).astype(np.float32), "y": np.arange(50)})
    return Batches(source, batch_size=8, seed=3)


def mesh(**axes):
    auto = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=auto)


@pytest.mark.parametrize("sizes", [[None, None, None], [2, 1, 4]])
@pytest.mark.parametrize("axes", [{"data": 4}, {"data": 2, "model": 4}])
def test_its_elements_are_those_of_the_batches(batches, axes, sizes):
    devices = mesh(**axes)
    shared = Shared(batches, jax.NamedSharding(devices, jax.P("data")))
    with shared.feed(sizes) as ours, batches.feed(sizes) as theirs:
        found, expected = list(ours), list(theirs)
    assert len(found) == len(sizes)
    for a, b in zip(found, expected, strict=True):
        for name in b:
            assert a[name].shape == b[name].shape
            np.testing.assert_array_equal(a[name], b[name])
            spec = jax.P("data") if sizes[0] is None else jax.P(None, "data")
            assert a[name].sharding == jax.NamedSharding(devices, spec)
    assert shared.state(3) == batches.state(3)


@pytest.mark.parametrize("sizes", [[None, None], [3]])
def test_only_the_rows_asked_for_are_read(batches, sizes):
    rows = np.array([1, 2, 7])
    with batches.feed(sizes, rows=rows) as part, batches.feed(sizes) as all_of_it:
        for a, b in zip(part, all_of_it, strict=True):
            for name in b:
                axis = 0 if sizes[0] is None else 1
                np.testing.assert_array_equal(a[name], np.take(b[name], rows, axis))


def test_it_reads_the_rows_of_this_process_devices(batches):
    devices = mesh(data=4, model=2)
    assert Shared(batches, jax.NamedSharding(devices, jax.P("data"))).rows.tolist() == [*range(8)]
