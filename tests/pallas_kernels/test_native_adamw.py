"""AdamW in C++: every number by the formula, wherever arrays are cut, and one result for any threads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fewer_threads import printed_with_one_and_two
from hypothesis import given, settings
from hypothesis import strategies as st

from fnml.pallas_kernels import native_faults, native_kernels
from fnml.pallas_kernels.native import Updated, adamw_update

pytestmark = pytest.mark.skipif(bool(native_faults()), reason="; ".join(native_faults()))

EPSILON = float(np.finfo(np.float32).eps)
RULE = {"b1": 0.8, "b2": 0.97, "eps": 1e-4}
PIECE = 2**16


def arrays(shapes, seed=0):
    """Return gradients and what is updated, in float32; squares are not negative."""
    rng = np.random.default_rng(seed)
    grads, held = [], []
    for shape in shapes:
        grad, param, mean, square = rng.normal(size=(4, *shape)).astype(np.float32)
        grads.append(grad)
        held.append(Updated(param, mean, square**2))
    return grads, held


def by_formula(grads, held, decays, rate, count):
    """Return the results in float64, and how far each may be: a few roundings of its terms."""
    b1, b2, eps = RULE.values()
    results = []
    for grad, before, decay in zip(np_wide(grads), held, decays, strict=True):
        param, mean, square = np_wide(before)
        m, s = b1 * mean + (1 - b1) * grad, b2 * square + (1 - b2) * grad**2
        root = np.sqrt(s / (1 - b2**count)) + eps
        move = m / (1 - b1**count) / root
        size = (b1 * abs(mean) + (1 - b1) * abs(grad)) / (1 - b1**count) / root
        exact = param - rate * (move + decay * param), m, s
        terms = abs(param) + rate * (size + decay * abs(param)), abs(b1 * mean) + abs(grad), s
        results.append([(x, 8 * EPSILON * t) for x, t in zip(exact, terms, strict=True)])
    return results


def np_wide(values):
    return [np.float64(x) for x in values]


def updated(grads, held, decays, rate, count):
    @jax.jit
    def run(grads, held, rate, count):
        return adamw_update(grads, held, decays, rate=rate, count=count, **RULE)

    with native_kernels():
        return run(grads, held, jnp.float32(rate), jnp.int32(count))


# Below and above a vector; a piece and what reaches over its end.
lengths = st.one_of(st.integers(1, 70), st.sampled_from([PIECE - 1, PIECE, PIECE + 1, 3 * PIECE]))


@settings(max_examples=20)
@given(
    sizes=st.lists(lengths, min_size=1, max_size=5),
    count=st.sampled_from([1, 2, 1000, 2**31 - 1]),
    decay=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 3),
)
def test_every_number_follows_the_formula(sizes, count, decay, seed):
    grads, held = arrays([(size,) for size in sizes], seed)
    decays = [decay * (i % 2) for i in range(len(sizes))]
    found = updated(grads, held, decays, 0.01, count)
    for results, exact in zip(found, by_formula(grads, held, decays, 0.01, count), strict=True):
        for value, (expected, far) in zip(results, exact, strict=True):
            assert value.shape == expected.shape and value.dtype == jnp.float32
            assert (abs(np.float64(value) - expected) <= far).all()


def test_arrays_that_are_still_needed_keep_their_numbers():
    grads, held = arrays([(5, 3), (), (2, 1, 7)])
    kept = jax.tree.map(jnp.asarray, held)
    again, first = (updated(grads, kept, [0.0] * 3, 0.1, 1) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, kept, held)
    jax.tree.map(np.testing.assert_array_equal, again, first)


def test_what_is_not_finite_stays_where_it_is():
    grads, held = arrays([(40,)])
    # The square of the third overflows: its parameter stands still, but for the decay.
    grads[0][[3, 20, 33]] = np.nan, np.inf, 1e25
    (found,) = updated(grads, held, [0.1], 0.1, 3)
    assert np.flatnonzero(~np.isfinite(found.param)).tolist() == [3, 20]
    np.testing.assert_allclose(found.param[33], 0.99 * held[0].param[33], rtol=1e-6)


SCRIPT = """
import hashlib, jax, jax.numpy as jnp
from fnml.pallas_kernels import native_kernels
from fnml.pallas_kernels.native import Updated, adamw_update
shapes = (3,), (300, 1001), (70_000,)
draw = lambda i: [jax.random.uniform(jax.random.fold_in(jax.random.key(i), j), s)
                  for j, s in enumerate(shapes)]
with native_kernels():
    found = jax.jit(lambda grads, *held: adamw_update(
        grads, [Updated(*x) for x in zip(*held)], [0.1] * 3, rate=jnp.float32(0.1),
        count=jnp.int32(2), b1=0.9, b2=0.99, eps=1e-8))(*map(draw, range(4)))
print(hashlib.sha256(b"".join(x.tobytes() for x in jax.tree.leaves(found))).hexdigest())
"""


def test_any_number_of_threads_gives_the_same_bits():
    one, two = printed_with_one_and_two(SCRIPT)
    assert len(one) == 64 and one == two
