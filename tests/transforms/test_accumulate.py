"""accumulate: the gradient of the whole batch, whatever the weights of its parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnml.core import LayoutError, Mean, Metrics, State, shard_key
from fnml.train import train_step
from fnml.transforms import accumulate, fuse

B, T, D, V = 24, 5, 4, 7
# Float32 sums of B * T terms in another order: a few ulps of 1.2e-7, relative to the norm.
BOUND = 2e-6


def relative(a, b) -> float:
    """Return the norm of the difference, relative to the norm of ``b``, in float64."""
    a, b = (np.concatenate([np.ravel(x).astype(float) for x in jax.tree.leaves(t)]) for t in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def loss_fn(params, batch, key, *, rate=0.0):
    """Average a token cross entropy over the tokens that count, with dropout on the inputs."""
    x = batch["x"]
    if rate:
        x = jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0.0)
    logits = jnp.tanh(x @ params["w1"]) @ params["w2"]
    nll = -jax.nn.log_softmax(logits)[
        jnp.arange(x.shape[0])[:, None], jnp.arange(T)[None], batch["y"]
    ]
    loss = Mean.of(nll, batch["mask"])
    hit = Mean.of(jnp.argmax(logits, -1).astype(jnp.int32) == batch["y"], batch["mask"])
    return loss.value, Metrics(loss.weight, {"accuracy": hit})


grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), static_argnames="rate")


def make(seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "w1": rng.normal(size=(D, D)).astype(np.float32),
        "w2": rng.normal(size=(D, V)).astype(np.float32),
    }
    batch = {
        "x": rng.normal(size=(B, T, D)).astype(np.float32),
        "y": rng.integers(0, V, (B, T)).astype(np.int32),
        # Sequences of very unequal lengths; the first third of the batch is masked entirely.
        "mask": (np.arange(T) < rng.integers(0, T + 1, (B, 1))).astype(np.float32),
    }
    batch["mask"][: B // 3] = 0
    return jax.tree.map(jnp.asarray, params), batch


def explicit(g, count, params, batch, key):
    """Average ``g`` over the shards by weight, written out in NumPy float64."""
    size = B // count
    parts = []
    for i in range(count):
        shard = jax.tree.map(lambda x, i=i: x[i * size : (i + 1) * size], batch)
        parts.append(jax.device_get(g(params, shard, shard_key(key, i))))
    weights = [float(metrics.weight) for (_, metrics), _ in parts]

    def mean(values):
        kept = [w * np.asarray(v, float) for w, v in zip(weights, values, strict=True) if w]
        return sum(kept) / sum(weights)

    loss = mean([loss for (loss, _), _ in parts])
    return loss, jax.tree.map(lambda *xs: mean(xs), *[grads for _, grads in parts])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8])
def test_unequal_masks_give_the_gradient_of_the_whole_batch(count):
    params, batch = make()
    key = jax.random.key(0)
    (loss, metrics), grads = jax.jit(grad_fn)(params, batch, key)
    (loss_n, metrics_n), grads_n = jax.jit(accumulate(grad_fn, count))(params, batch, key)
    assert relative(grads_n, grads) < BOUND
    assert relative(loss_n, loss) < BOUND
    # Counts are whole numbers: they merge without rounding.
    assert jax.tree.map(float, metrics_n) == jax.tree.map(float, metrics)


def test_the_mean_of_means_is_the_bug_that_this_avoids():
    params, batch = make()
    key, size = jax.random.key(0), B // 4
    whole = grad_fn(params, batch, key)[1]
    shards = [jax.tree.map(lambda x, i=i: x[i * size : (i + 1) * size], batch) for i in range(4)]
    means = [grad_fn(params, shard, key)[1] for shard in shards]
    naive = jax.tree.map(lambda *grads: sum(grads) / 4, *means)
    assert relative(naive, whole) > 0.1
    ours = jax.jit(accumulate(grad_fn, 4))(params, batch, key)[1]
    assert relative(ours, whole) < BOUND


@pytest.mark.parametrize("count", [1, 3, 8])
def test_with_dropout_it_is_the_weighted_mean_over_shards_with_their_own_keys(count):
    params, batch = make(1)
    key = jax.random.key(3)

    def g(params, batch, key):
        return grad_fn(params, batch, key, rate=0.5)

    loss, grads = explicit(g, count, params, batch, key)
    (loss_n, _), grads_n = jax.jit(accumulate(g, count))(params, batch, key)
    assert relative(grads_n, grads) < BOUND and relative(loss_n, loss) < BOUND
    other = jax.jit(accumulate(g, count))(params, batch, jax.random.key(4))[1]
    assert relative(other, grads) > 0.01


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 99), count=st.sampled_from([2, 3, 4]), power=st.integers(0, 6))
def test_a_linear_model_against_the_formula_in_float64(seed, count, power):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(12, 3)), rng.normal(size=12)
    weights = rng.integers(0, 3, 12) * 10.0**power
    weights[-1] = 1.0
    w = rng.normal(size=3)

    def squares(params, batch, key):
        error = Mean.of((batch["x"] @ params - batch["y"]) ** 2, batch["weights"])
        return error.value, Metrics(error.weight)

    batch = {"x": x, "y": y, "weights": weights}
    args = (w, batch)
    args32 = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), args)
    g = jax.jit(accumulate(jax.value_and_grad(squares, has_aux=True), count))
    (loss, metrics), grads = g(*args32, jax.random.key(0))
    residual = x @ w - y
    assert relative(grads, 2 * (weights * residual) @ x / weights.sum()) < 1e-5
    assert relative(loss, (weights * residual**2).sum() / weights.sum()) < 1e-5
    assert relative(metrics.weight, weights.sum()) < 1e-6


@pytest.mark.parametrize(("inner", "outer"), [(2, 4), (4, 2), (2, 3)])
def test_nested_accumulation_has_the_bits_and_the_keys_of_the_flat_one(inner, outer):
    params, batch = make(2)
    key = jax.random.key(0)

    def g(params, batch, key):
        return grad_fn(params, batch, key, rate=0.5)

    flat = jax.jit(accumulate(g, inner * outer))(params, batch, key)
    nested = jax.jit(accumulate(accumulate(g, inner), outer))(params, batch, key)
    jax.tree.map(np.testing.assert_array_equal, nested, flat)


@pytest.mark.parametrize("count", [2, 6])
def test_inside_a_shard_map_of_the_users_own_each_device_accumulates_what_it_holds(count):
    params, batch = make()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    key = jax.random.key(0)

    def local(params, batch):
        params = jax.lax.pcast(params, "data", to="varying")
        _, grads = accumulate(grad_fn, count)(params, batch, key)
        return jax.tree.map(lambda x: x[None], grads)

    specs = (jax.P(), jax.P("data"))
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=jax.P("data")))
    both = run(params, batch)
    for i in range(2):
        half = jax.tree.map(lambda x, i=i: x[i * B // 2 : (i + 1) * B // 2], batch)
        own = jax.tree.map(lambda x, i=i: x[i], both)
        assert relative(own, grad_fn(params, half, key)[1]) < BOUND


def test_an_inner_count_that_is_no_power_of_two_is_refused():
    with pytest.raises(LayoutError, match=r"3 shards.*power of two"):
        accumulate(accumulate(grad_fn, 3), 2)


def test_a_batch_where_nothing_counts_gives_zeros():
    params, batch = make()
    batch["mask"][:] = 0
    (loss, metrics), grads = jax.jit(accumulate(grad_fn, 4))(params, batch, jax.random.key(0))
    assert float(loss) == float(metrics.weight) == 0.0
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_bfloat16_gradients_are_summed_in_float32_and_rounded_once():
    rng = np.random.default_rng(0)
    batch = {
        "grads": jnp.asarray(rng.uniform(1, 2, (16, 50)), jnp.bfloat16),
        "weight": jnp.asarray(rng.integers(1, 9, 16), jnp.float32),
    }

    def given(params, batch, key):
        return (jnp.bfloat16(1.0), Metrics(batch["weight"][0])), batch["grads"][0]

    params = jnp.zeros(50, jnp.bfloat16)
    (loss, _), grads = accumulate(given, 16)(params, batch, jax.random.key(0))
    weights = np.asarray(batch["weight"], float)
    expected = weights @ np.asarray(batch["grads"], float) / weights.sum()
    assert grads.dtype == jnp.bfloat16 and float(loss) == 1.0
    # One rounding to 8 bits of mantissa: at most half an ulp, 2**-8 between 1 and 2.
    assert np.abs(np.asarray(grads, float) - expected).max() < 2**-8 * 1.001


def test_model_statistics_merge_to_those_of_the_whole_batch():
    def stateful(params, batch, key, *, state, train):
        assert train is True
        h = batch @ params + state["mean"].reshape(1, -1)
        stats = {"mean": Mean(h.sum(0), jnp.float32(h.shape[0]) * jnp.ones(h.shape[1]))}
        error = Mean.of(h**2)
        return error.value, Metrics(error.weight, {}, stats)

    rng = np.random.default_rng(0)
    batch = jnp.asarray(rng.normal(size=(12, 3)), jnp.float32)
    params = jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)
    state = {"mean": jnp.array([1.0, -1.0])}
    g = jax.value_and_grad(stateful, has_aux=True)
    args = params, batch, jax.random.key(0)
    (_, metrics), _ = accumulate(g, 6)(*args, state=state, train=True)
    whole = np.asarray(batch, float) @ np.asarray(params, float) + np.array([1.0, -1.0])
    mean = metrics.stats["mean"]
    np.testing.assert_array_equal(mean.weight, 12.0)
    np.testing.assert_allclose(mean.value, whole.mean(0), rtol=1e-6)


def test_inside_fuse_it_has_the_bits_of_single_steps():
    params, _ = make()
    batches = [make(seed)[1] for seed in range(3)]

    def g(params, batch, key):
        return grad_fn(params, batch, key, rate=0.3)

    tx = optax.sgd(0.1)
    step = train_step(accumulate(g, 3), tx)
    state = State.create(params, tx, jax.random.key(7))
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *batches)
    fused, _ = jax.jit(fuse(step, 3))(state, stacked)
    single = jax.jit(step)
    for batch in batches:
        state, _ = single(state, batch)
    jax.tree.map(np.testing.assert_array_equal, fused.params, state.params)


def test_activation_memory_falls_to_that_of_a_micro_batch():
    def deep(params, batch, key):
        for _ in range(4):
            batch = jnp.tanh(batch @ params)
        error = Mean.of(batch)
        return error.value, Metrics(error.weight)

    g = jax.value_and_grad(deep, has_aux=True)
    args = jnp.zeros((16, 16)), jnp.zeros((4096, 16)), jax.random.key(0)

    def temporary(f):
        return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert temporary(accumulate(g, 8)) < 0.25 * temporary(g)


def test_a_count_below_1_and_a_batch_that_does_not_divide_are_named():
    with pytest.raises(LayoutError, match="at least 1 micro-batch, got 0"):
        accumulate(grad_fn, 0)
    params, batch = make()
    with pytest.raises(LayoutError, match="24 examples cannot be divided into 5"):
        accumulate(grad_fn, 5)(params, batch, jax.random.key(0))
