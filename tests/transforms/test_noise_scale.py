"""noise_scale: the paper's estimators, unbiased also where shards weigh differently."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from fnml.core import ConfigError, LayoutError, Mean, Metrics, State
from fnml.train import train_step
from fnml.transforms import accumulate, data_parallel, fuse, noise_scale, per_example, private

KEY, D = jax.random.key(0), 3


def loss_fn(params, batch, key):
    """The gradient of an example is the example itself."""
    value = jnp.sum(batch["x"] * jnp.broadcast_to(params, batch["x"].shape), 1)
    loss = Mean.of(value, batch["mask"])
    return loss.value, Metrics(loss.weight, {"value": loss})


GRAD = jax.value_and_grad(loss_fn, has_aux=True)
PARAMS = jnp.ones(D)


def draw(rng, shape, mean=1.0):
    """Draw examples with the gradient ``mean`` in each of D directions and covariance 4 I."""
    x = mean + 2 * rng.normal(size=(*shape, D))
    return {"x": x.astype(np.float32), "mask": np.ones(shape, np.float32)}


def mesh():
    return jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))


LAYOUTS = {
    "accumulate": lambda g: accumulate(g, 4),
    "data_parallel": lambda g: data_parallel(accumulate(g, 2), mesh()),
}


@functools.cache
def estimate(name="accumulate"):
    return jax.jit(noise_scale(GRAD, LAYOUTS[name]))


def pair(metrics):
    values = metrics.values
    return np.array([float(values[f"noise_scale_{n}"].total) for n in ("signal", "trace")])


def test_for_equal_weights_it_is_appendix_a():
    batch = draw(np.random.default_rng(0), (16,))
    (_, metrics), _ = estimate()(PARAMS, batch, KEY)
    small, big = 4, 16
    x = batch["x"].astype(float)
    big_square = (x.mean(0) ** 2).sum()
    small_square = (x.reshape(4, small, D).mean(1) ** 2).sum(1).mean()
    signal = (big * big_square - small * small_square) / (big - small)
    trace = (small_square - big_square) / (1 / small - 1 / big)
    np.testing.assert_allclose(pair(metrics), [signal, trace], rtol=1e-5)


@pytest.mark.parametrize("unequal", [False, True])
def test_both_estimates_are_unbiased(unequal):
    rng = np.random.default_rng(1)
    count = 2000
    batches = draw(rng, (count, 16))
    if unequal:
        # Between 0 and 4 of each shard's examples count: some shards weigh nothing at all.
        lengths = rng.integers(0, 5, (count, 4, 1))
        batches["mask"] = (np.arange(4) < lengths).reshape(count, 16).astype(np.float32)
        batches["mask"][:, :8] = 1
    run = jax.jit(
        lambda batches: jax.lax.map(
            lambda b: noise_scale(GRAD, LAYOUTS["accumulate"])(PARAMS, b, KEY)[0][1].values, batches
        )
    )
    values = run(batches)
    for name, true in (("noise_scale_signal", D * 1.0), ("noise_scale_trace", D * 4.0)):
        found = np.float64(values[name].total)
        assert (np.asarray(values[name].weight) == 1).all()
        error = found.std() / np.sqrt(count)
        # Four standard errors; a bias as of an estimate that ignores the weights is larger.
        assert abs(found.mean() - true) < 4 * error, (name, found.mean(), error)
        assert error < 0.05 * true


def test_a_shard_whose_loss_is_0_by_0_adds_nothing():
    def naive(params, batch, key):
        value = batch["x"] @ params * batch["mask"]
        weight = jnp.sum(batch["mask"])
        return jnp.sum(value) / weight, Metrics(weight)

    batch = draw(np.random.default_rng(6), (16,))
    batch["mask"][:5] = 0
    found = noise_scale(jax.value_and_grad(naive, has_aux=True), LAYOUTS["accumulate"])
    (_, metrics), _ = jax.jit(found)(PARAMS, batch, KEY)
    (_, expected), _ = estimate()(PARAMS, batch, KEY)
    np.testing.assert_allclose(pair(metrics), pair(expected), rtol=1e-5)
    assert np.isfinite(pair(expected)).all()


def test_nothing_else_changes():
    batch = draw(np.random.default_rng(2), (16,))
    batch["mask"][:5] = 0
    (loss, metrics), grads = estimate()(PARAMS, batch, KEY)
    (loss_r, metrics_r), grads_r = jax.jit(accumulate(GRAD, 4))(PARAMS, batch, KEY)
    values = {name: metrics.values[name] for name in metrics_r.values}
    jax.tree.map(
        np.testing.assert_array_equal,
        (loss, metrics.weight, values, grads),
        (loss_r, metrics_r.weight, dict(metrics_r.values), grads_r),
    )
    assert set(metrics.values) - set(values) == {"noise_scale_signal", "noise_scale_trace"}


def test_on_devices_it_has_the_same_bits():
    batch = draw(np.random.default_rng(3), (16,))
    jax.tree.map(
        np.testing.assert_array_equal,
        estimate("data_parallel")(PARAMS, batch, KEY),
        estimate()(PARAMS, batch, KEY),
    )


@pytest.mark.parametrize("counting", [0, 1])
def test_with_fewer_than_two_shards_that_count_there_is_no_estimate(counting):
    batch = draw(np.random.default_rng(4), (16,))
    batch["mask"][4 * counting :] = 0
    (loss, metrics), _ = estimate()(PARAMS, batch, KEY)
    means = [metrics.values[f"noise_scale_{n}"] for n in ("signal", "trace")]
    assert [(float(m.total), float(m.weight)) for m in means] == [(0.0, 0.0)] * 2
    assert np.isfinite(loss)


def test_in_training_metrics_of_many_steps_merge_to_the_noise_scale():
    still = optax.sgd(0.0)
    step = train_step(noise_scale(GRAD, LAYOUTS["accumulate"]), still)
    batches = draw(np.random.default_rng(5), (400, 16))
    state = State.create(PARAMS, still, KEY)
    _, metrics = jax.jit(fuse(step, 400))(state, batches)
    signal, trace = (
        float(np.float64(metrics[f"noise_scale_{n}"].total).mean()) for n in ("signal", "trace")
    )
    # The true noise scale is 4 D / D; the estimates' own spread is a few per cent.
    assert abs(trace / signal - 4.0) < 0.5


def test_orders_and_names_that_do_not_work_are_refused():
    with pytest.raises(LayoutError, match=r"noise_scale\(grad_fn, lambda g: accumulate\(g, n\)\)"):
        noise_scale(accumulate(GRAD, 2), LAYOUTS["accumulate"])
    with pytest.raises(LayoutError, match="at least 2 of them, got 1"):
        noise_scale(GRAD, lambda g: accumulate(g, 1))
    with pytest.raises(LayoutError, match="at least 2 of them, got no layout"):
        noise_scale(GRAD, lambda g: g)
    twice = noise_scale(noise_scale(GRAD, LAYOUTS["accumulate"]), LAYOUTS["accumulate"])
    with pytest.raises(ConfigError, match=r"cannot be named.*apply noise_scale once"):
        twice(PARAMS, draw(np.random.default_rng(0), (16,)), KEY)


@pytest.mark.parametrize(
    "single",
    [per_example, lambda g: private(g, clip=1.0, noise=1.0)],
    ids=["per_example", "private"],
)
def test_gradients_of_single_examples_have_no_noise_scale_in_either_order(single):
    # Estimated around `private`, every shard would add its own noise.
    with pytest.raises(LayoutError, match=r"noise_scale cannot go around (per_example|private)"):
        noise_scale(single(GRAD), LAYOUTS["accumulate"])
    inside = single(noise_scale(GRAD, LAYOUTS["accumulate"]))
    with pytest.raises(LayoutError, match=r"4 shards.*cannot go inside per_example or private"):
        inside(PARAMS, draw(np.random.default_rng(0), (16,)), KEY)
