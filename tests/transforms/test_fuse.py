"""fuse: many steps in one dispatch, with the bits of single steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fnml.core import LayoutError, Mean, Metrics, ShapeError, State
from fnml.train import train_step
from fnml.transforms import fuse

K = 5


def loss_fn(params, batch, key):
    kept = jax.random.bernoulli(key, 0.7, batch["x"].shape)
    h = jnp.tanh(jnp.where(kept, batch["x"], 0.0) @ params["w1"] + params["b"].reshape(1, -1))
    error = Mean.of((h @ params["w2"] - batch["y"]) ** 2)
    return error.value, Metrics(error.weight, {"size": Mean.of(jnp.abs(h))})


TX = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.01))
STEP = train_step(jax.value_and_grad(loss_fn, has_aux=True), TX, grad_norm=True)
SINGLE = jax.jit(STEP)
FUSED = jax.jit(fuse(STEP, K))


def start():
    rng = np.random.default_rng(0)
    params = {
        "w1": jnp.asarray(rng.normal(size=(6, 16)), jnp.float32),
        "b": jnp.zeros(16),
        "w2": jnp.asarray(rng.normal(size=(16, 2)), jnp.float32),
    }
    return State.create(params, TX, jax.random.key(1))


def batches():
    rng = np.random.default_rng(1)
    return {
        "x": rng.normal(size=(K, 8, 6)).astype(np.float32),
        "y": rng.normal(size=(K, 8, 2)).astype(np.float32),
    }


def bits(tree):
    def raw(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return [np.asarray(raw(x)).tobytes() for x in jax.tree.leaves(tree)]


def by_hand(count):
    state, rows = start(), []
    for i in range(count):
        state, metrics = SINGLE(state, jax.tree.map(lambda x, i=i: x[i], batches()))
        rows.append(metrics)
    return state, rows


@pytest.mark.parametrize("steps", range(K + 1))
def test_the_first_n_steps_have_the_bits_and_the_metrics_of_n_single_steps(steps):
    state, metrics = FUSED(start(), batches(), steps)
    expected, rows = by_hand(steps)
    assert bits(state) == bits(expected)
    assert int(state.step) == steps
    assert metrics.keys() == {"loss", "size", "grad_norm"}
    for i, row in enumerate(rows):
        assert bits(jax.tree.map(lambda x, i=i: x[i], metrics)) == bits(row)
    assert not any(np.any(x[steps:]) for x in jax.tree.leaves(metrics))


def test_all_steps_are_done_without_being_asked_for():
    assert bits(jax.jit(fuse(STEP, K))(start(), batches())[0]) == bits(by_hand(K)[0])
    first = jax.tree.map(lambda x: x[:1], batches())
    assert bits(jax.jit(fuse(STEP, 1))(start(), first)[0]) == bits(by_hand(1)[0])


def test_another_number_of_steps_needs_no_compilation():
    traces = []

    def step(state, x):
        traces.append(x)
        return state + x, state

    run = jax.jit(fuse(step, 3))
    out = [run(jnp.int32(0), jnp.array([1, 2, 4]), n) for n in (1, 3, 2, 0)]
    assert [int(state) for state, _ in out] == [1, 7, 3, 0]
    assert [rows.tolist() for _, rows in out] == [[0, 0, 0], [0, 1, 3], [0, 1, 0], [0, 0, 0]]
    assert run._cache_size() == 1
    # Once for the shapes of the metrics, once or twice by fori_loop; never again for another n.
    count = len(traces)
    run(jnp.int32(0), jnp.array([1, 2, 4]), 1)
    assert len(traces) == count


def test_two_blocks_in_a_row_are_one_long_run():
    head, tail = (jax.tree.map(lambda x, s=s: x[s], batches()) for s in (slice(3), slice(3, K)))
    state, _ = jax.jit(fuse(STEP, 3))(start(), head)
    state, _ = jax.jit(fuse(STEP, 2))(state, tail)
    assert bits(state) == bits(by_hand(K)[0])


def test_a_leaf_of_another_length_is_named_with_all_others():
    bad = {
        "x": np.zeros((4, 8, 6), np.float32),
        "y": np.float32(0),
        "z": np.zeros((K, 1)),
        "long": np.zeros(K + 1),
    }
    with pytest.raises(ShapeError) as error:
        fuse(STEP, K)(start(), bad)
    message = str(error.value)
    assert "fuse(5)" in message and "x: (4, 8, 6)" in message and "y: ()" in message
    assert "long: (6,)" in message and "z:" not in message


def test_a_count_below_1_is_refused():
    with pytest.raises(LayoutError, match="at least 1 step, got 0"):
        fuse(STEP, 0)
