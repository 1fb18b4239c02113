"""sam: two gradients by hand, alone and inside layouts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from fnml.core import ConfigError, LayoutError, Mean, Metrics, shard_key
from fnml.transforms import accumulate, data_parallel, sam

RHO, KEY = 0.3, jax.random.key(1)
# Two gradients in float32 against float64, relative to the norm.
BOUND = 3e-6
rng = np.random.default_rng(0)
W, X, Y = rng.normal(size=3), rng.normal(size=(8, 3)), rng.normal(size=8)
MASK = np.array([0, 0, 1, 1, 1, 0.5, 2, 1])
PARAMS = {"w": jnp.asarray(W, jnp.float32), "b": jnp.float32(0.5)}
BATCH = {k: jnp.asarray(v, jnp.float32) for k, v in {"x": X, "y": Y, "mask": MASK}.items()}


def loss_fn(params, batch, key, *, rate=0.0):
    x = batch["x"]
    if rate:
        x = jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0.0)
    error = Mean.of((x @ params["w"] + params["b"] - batch["y"]) ** 2, batch["mask"])
    return error.value, Metrics(error.weight, {"mse": error})


GRAD = jax.value_and_grad(loss_fn, has_aux=True)


def by_hand(part, theta):
    """Return loss and gradient of the weighted squares at ``theta`` = (b, w), in float64."""
    x, y, mask = X[part], Y[part], MASK[part]
    x = np.concatenate([np.ones((len(x), 1)), x], 1)
    residual = x @ theta - y
    return (mask * residual**2).sum() / mask.sum(), 2 * (mask * residual) @ x / mask.sum()


def sam_by_hand(part):
    theta = np.concatenate([[0.5], W])
    low, g = by_hand(part, theta)
    high, sharp = by_hand(part, theta + RHO * g / np.linalg.norm(g))
    return low, high - low, sharp


def flat(grads):
    return np.concatenate([[grads["b"]], grads["w"]]).astype(np.float64)


def test_it_is_the_gradient_at_the_worst_point_written_by_hand():
    (loss, metrics), grads = jax.jit(sam(GRAD, RHO))(PARAMS, BATCH, KEY)
    low, rise, sharp = sam_by_hand(slice(None))
    assert np.linalg.norm(flat(grads) - sharp) < BOUND * np.linalg.norm(sharp)
    np.testing.assert_allclose(loss, low, rtol=BOUND)
    np.testing.assert_allclose(metrics.values["mse"].value, low, rtol=BOUND)
    np.testing.assert_allclose(metrics.values["sharpness"].value, rise, rtol=1e-5)
    assert float(metrics.weight) == float(metrics.values["sharpness"].weight) == MASK.sum()
    plain = flat(GRAD(PARAMS, BATCH, KEY)[1])
    assert np.linalg.norm(plain - sharp) > 0.05 * np.linalg.norm(sharp)


def mesh():
    return jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))


LAYOUTS = {
    "accumulate": lambda g: accumulate(g, 4),
    "data_parallel": lambda g: data_parallel(accumulate(g, 2), mesh()),
}


@functools.cache
def laid_out(name):
    return jax.jit(LAYOUTS[name](sam(GRAD, RHO)))(PARAMS, BATCH, KEY)


def test_inside_a_layout_every_shard_climbs_alone_and_an_empty_one_not_at_all():
    (loss, metrics), grads = laid_out("accumulate")
    parts = [slice(i, i + 2) for i in (2, 4, 6)]  # the first shard is masked entirely
    lows, rises, sharps = zip(*map(sam_by_hand, parts), strict=True)
    weights = [MASK[part].sum() for part in parts]
    expected = np.average(sharps, axis=0, weights=weights)
    assert np.linalg.norm(flat(grads) - expected) < BOUND * np.linalg.norm(expected)
    np.testing.assert_allclose(loss, np.average(lows, weights=weights), rtol=BOUND)
    rise = metrics.values["sharpness"]
    np.testing.assert_allclose(rise.value, np.average(rises, weights=weights), rtol=1e-5)
    assert float(rise.weight) == MASK.sum()


def test_a_shard_whose_loss_is_0_by_0_adds_nothing():
    def naive(params, batch, key):
        error = (batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2
        weight = jnp.sum(batch["mask"])
        return jnp.sum(error * batch["mask"]) / weight, Metrics(weight)

    (_, metrics), grads = accumulate(sam(jax.value_and_grad(naive, has_aux=True), RHO), 4)(
        PARAMS, BATCH, KEY
    )
    (_, expected), grads_r = laid_out("accumulate")
    assert np.linalg.norm(flat(grads) - flat(grads_r)) < BOUND * np.linalg.norm(flat(grads_r))
    found, rise = metrics.values["sharpness"], expected.values["sharpness"]
    np.testing.assert_allclose([found.total, found.weight], [rise.total, rise.weight], rtol=1e-5)


def test_layouts_have_the_same_bits():
    jax.tree.map(np.testing.assert_array_equal, laid_out("data_parallel"), laid_out("accumulate"))


def test_both_points_see_the_same_random_numbers_and_options():
    dropped = functools.partial(GRAD, rate=0.5)
    found = jax.jit(functools.partial(sam(GRAD, RHO), rate=0.5))(PARAMS, BATCH, KEY)[1]
    (_, _), g = dropped(PARAMS, BATCH, KEY)
    share = RHO / np.linalg.norm(flat(g))
    up = jax.tree.map(lambda p, g: (p + share * g).astype(jnp.float32), PARAMS, g)
    expected = flat(dropped(up, BATCH, KEY)[1])
    assert np.linalg.norm(flat(found) - expected) < BOUND * np.linalg.norm(expected)
    other = flat(dropped(up, BATCH, shard_key(KEY, 1))[1])
    assert np.linalg.norm(other - expected) > 0.01 * np.linalg.norm(expected)


def test_where_all_gradients_are_0_it_stays():
    def still(params, batch, key):
        return jnp.sum(params["w"] * 0.0), Metrics(jnp.float32(1.0))

    (_, metrics), grads = sam(jax.value_and_grad(still, has_aux=True))(PARAMS, BATCH, KEY)
    assert flat(grads).tolist() == [0.0] * 4
    assert float(metrics.values["sharpness"].total) == 0.0


def test_narrow_parameters_stay_narrow():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    batch = jax.tree.map(lambda p: p.astype(jnp.bfloat16), BATCH)
    grads = sam(GRAD, RHO)(params, batch, KEY)[1]
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}


def test_a_layout_inside_a_bad_radius_and_a_taken_name_are_refused():
    with pytest.raises(LayoutError, match=r"accumulate\(sam\(grad_fn, ...\), n\)"):
        sam(accumulate(GRAD, 2))
    for rho in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=f"positive, got {rho}"):
            sam(GRAD, rho)
    with pytest.raises(ConfigError, match=r"cannot be named 'sharpness'.*apply sam once"):
        sam(sam(GRAD))(PARAMS, BATCH, KEY)
