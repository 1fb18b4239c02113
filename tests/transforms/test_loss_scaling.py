"""loss_scaling: gradients without a scale's trace, and a scale that follows the rule."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from fnml.core import ConfigError, LayoutError, Mean, Metrics, State
from fnml.train import train_step
from fnml.transforms import (
    Policy,
    accumulate,
    data_parallel,
    fuse,
    loss_scaling,
    mixed_precision,
    pmap,
    scaled_value_and_grad,
    skip_nonfinite,
    with_loss_scale,
)

KEY = jax.random.key(0)
OPTIMIZER = optax.adam(1e-2)


def loss_fn(params, batch, key):
    """Fit a layer whose gradients a batch of large numbers makes overflow."""
    h = jnp.tanh(batch["x"] @ params["w"]) @ params["v"]
    noise = jax.random.normal(key, h.shape).astype(h.dtype)
    error = Mean.of((h - batch["y"] + 0.1 * noise) ** 2)
    return error.value, Metrics(error.weight, {"h": Mean.of(h)})


def make(seed=0):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(3, 4)), "v": rng.normal(size=4)}
    batch = {"x": rng.normal(size=(8, 3)), "y": rng.normal(size=8)}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, batch))


PARAMS, BATCH = make()
HALF = mixed_precision(loss_fn, Policy(compute="float16"))


def bits(tree):
    def raw(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return [np.asarray(raw(x)).tobytes() for x in jax.tree.leaves(tree)]


def without_scale(result):
    (loss, metrics), grads = result
    values = {name: mean for name, mean in metrics.values.items() if name != "loss_scale"}
    return (loss, dataclasses.replace(metrics, values=values)), grads


@pytest.mark.parametrize("power", [-3, 0, 1, 10])
@pytest.mark.parametrize("loss", [loss_fn, mixed_precision(loss_fn)], ids=["float32", "bfloat16"])
def test_a_scale_that_fits_leaves_no_trace(loss, power):
    plain = jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS, BATCH, KEY)
    scaled = jax.jit(scaled_value_and_grad(loss))(
        PARAMS, BATCH, KEY, loss_scale=jnp.float32(2.0**power)
    )
    assert bits(without_scale(scaled)) == bits(plain)
    assert float(scaled[0][1].values["loss_scale"].value) == 2.0**power


def test_without_the_option_it_is_value_and_grad():
    plain = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(PARAMS, BATCH, KEY)
    assert bits(without_scale(jax.jit(scaled_value_and_grad(loss_fn))(PARAMS, BATCH, KEY))) == bits(
        plain
    )


def test_it_saves_gradients_that_float16_rounds_to_0():
    def faint(params, batch, key):
        # The gradient passes through float16 at 2**-26, below its smallest number.
        x = (params * 1.0).astype(jnp.float16)
        return jnp.sum(x.astype(jnp.float32)) * 2.0**-26, Metrics(jnp.float32(1.0))

    params = jnp.ones(3)
    lost = jax.value_and_grad(faint, has_aux=True)(params, None, None)[1]
    found = scaled_value_and_grad(faint)(params, None, None, loss_scale=jnp.float32(2.0**15))[1]
    assert lost.tolist() == [0.0] * 3
    assert found.tolist() == [2.0**-26] * 3


def mesh():
    return jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))


LAYOUTS = {
    "accumulate": lambda g: accumulate(g, 4),
    "data_parallel": lambda g: data_parallel(accumulate(g, 2), mesh()),
    "pmap": lambda g: pmap(accumulate(g, 2), jax.devices()[:2]),
}


@functools.cache
def step_of(layout: str, interval: int = 2):
    grad_fn = LAYOUTS[layout](scaled_value_and_grad(HALF))
    return loss_scaling(lambda g: train_step(g, OPTIMIZER), grad_fn, interval=interval)


def start(scale):
    return with_loss_scale(State.create(PARAMS, OPTIMIZER, jax.random.key(3)), scale)


def rule(scale, good, fine, interval, factor, smallest, largest):
    """Return the next scale and count of good steps, in plain Python."""
    if not fine:
        return max(scale / factor, smallest), 0
    if good + 1 == interval:
        return min(scale * factor, largest), 0
    return scale, good + 1


@settings(max_examples=15)
@given(
    fine=st.lists(st.booleans(), min_size=20, max_size=20),
    interval=st.integers(1, 4),
    factor=st.sampled_from([2.0, 4.0]),
)
def test_the_scale_follows_the_rule(fine, interval, factor):
    bounds = {"smallest": 2.0, "largest": 64.0}

    def given_grads(params, batch, key, *, loss_scale):
        values = {"loss_scale": Mean(loss_scale, jnp.float32(1.0))}
        return (batch, Metrics(jnp.float32(1.0), values)), jax.tree.map(
            lambda p: jnp.full_like(p, batch), params
        )

    step = loss_scaling(
        lambda g: train_step(g, OPTIMIZER), given_grads, interval=interval, factor=factor, **bounds
    )
    batches = np.where(fine, 1.0, np.inf).astype(np.float32)
    _, metrics = jax.jit(fuse(step, 20))(start(16.0), batches)
    scale, good, expected = 16.0, 0, []
    for ok in fine:
        expected.append(scale)
        scale, good = rule(scale, good, ok, interval, factor, **bounds)
    assert metrics["loss_scale"].total.tolist() == expected
    assert metrics["overflow"].total.tolist() == [float(not ok) for ok in fine]
    assert metrics["loss"].weight.tolist() == [float(ok) for ok in fine]


def test_a_real_overflow_is_undone_and_the_run_recovers():
    # 2**24 overflows float16 in the backward pass; the scale falls until it fits.
    state, step = start(2.0**24), jax.jit(step_of("accumulate"))
    undone = 0
    for i in range(20):
        before, (state, metrics) = state, step(state, BATCH)
        assert int(state.step) == i + 1
        if float(metrics["overflow"].value):
            undone += 1
            assert bits(state.params) == bits(before.params)
            assert bits(state.opt_state.inner) == bits(before.opt_state.inner)
            assert float(metrics["loss"].weight) == 0.0
        else:
            assert bits(state.params) != bits(before.params)
            assert float(metrics["loss"].weight) == 8.0
    assert 3 < undone < 18
    assert np.isfinite(np.concatenate([np.ravel(p) for p in jax.tree.leaves(state.params)])).all()


@pytest.mark.parametrize("layout", ["data_parallel", "pmap"])
def test_every_layout_has_the_same_bits(layout):
    found = [jax.jit(step_of(name))(start(2.0**12), BATCH) for name in ("accumulate", layout)]
    assert bits(found[0]) == bits(found[1])
    assert float(found[0][1]["overflow"].value) == 0.0


def test_fused_it_has_the_bits_of_single_steps():
    step = step_of("accumulate")
    batches = jax.tree.map(lambda x: jnp.stack([x] * 8), BATCH)
    fused, metrics = jax.jit(fuse(step, 8))(start(2.0**18), batches)
    state, single = start(2.0**18), jax.jit(step)
    for _ in range(8):
        state, _ = single(state, BATCH)
    assert bits(fused) == bits(state)
    assert 0 < float(metrics["overflow"].total.sum()) < 8


def test_while_nothing_overflows_it_is_the_unscaled_step():
    loss = mixed_precision(loss_fn)  # bfloat16 has the range of float32
    plain = train_step(accumulate(jax.value_and_grad(loss, has_aux=True), 4), OPTIMIZER)
    scaled = loss_scaling(
        lambda g: train_step(g, OPTIMIZER), accumulate(scaled_value_and_grad(loss), 4)
    )
    state, _ = jax.jit(plain)(State.create(PARAMS, OPTIMIZER, jax.random.key(3)), BATCH)
    found, metrics = jax.jit(scaled)(start(2.0**10), BATCH)
    for x, y in zip(*map(jax.tree.leaves, (found.params, state.params)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    assert float(metrics["loss_scale"].value) == 2.0**10


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_with_skip_nonfinite_around_or_within_the_scale_still_falls(where):
    grad_fn = accumulate(scaled_value_and_grad(HALF), 2)
    if where == "inside":
        step = loss_scaling(lambda g: skip_nonfinite(train_step(g, OPTIMIZER)), grad_fn)
    else:
        step = skip_nonfinite(loss_scaling(lambda g: train_step(g, OPTIMIZER), grad_fn))
    state, metrics = jax.jit(step)(start(2.0**24), BATCH)
    assert float(metrics["overflow"].value) == 1.0
    assert float(state.opt_state.loss_scale.scale) == 2.0**23
    assert bits(state.params) == bits(PARAMS)


def test_wrong_orders_are_refused_with_the_one_that_works():
    order = r"loss_scaling\(make_step, accumulate\(scaled_value_and_grad\(loss_fn\), n\)\)"
    plain = jax.value_and_grad(loss_fn, has_aux=True)

    def swallows(params, batch, key, **options):
        return plain(params, batch, key)

    for grad_fn in (plain, accumulate(plain, 2), swallows):
        with pytest.raises(LayoutError, match=order):
            loss_scaling(lambda g: train_step(g, OPTIMIZER), grad_fn)(start(2.0), BATCH)
    inside = r"accumulate\(scaled_value_and_grad\(loss_fn\), n\), not the other way"
    for grad_fn in (plain, accumulate(plain, 2)):
        with pytest.raises(LayoutError, match=inside):
            scaled_value_and_grad(grad_fn)(PARAMS, BATCH, KEY)


def test_several_steps_at_once_are_refused_by_number_and_order():
    """One scale cannot be found for two steps by one verdict."""
    grad_fn = scaled_value_and_grad(loss_fn)
    step = loss_scaling(lambda g: fuse(train_step(g, OPTIMIZER), 2), grad_fn)
    batches = jax.tree.map(lambda x: jnp.stack([x, x]), BATCH)
    with pytest.raises(LayoutError, match=r"takes 2 at once.*fuse\(loss_scaling\("):
        step(start(2.0), batches)


def test_bad_arguments_and_states_are_named():
    make_step = functools.partial(train_step, optimizer=OPTIMIZER)
    grad_fn = scaled_value_and_grad(loss_fn)
    with pytest.raises(ConfigError, match="interval=0"):
        loss_scaling(make_step, grad_fn, interval=0)
    with pytest.raises(ConfigError, match=r"powers of two.*got factor=1.5, largest=3.0"):
        loss_scaling(make_step, grad_fn, factor=1.5, largest=3.0)
    with pytest.raises(ConfigError, match=r"got initial=1000.0"):
        start(1000.0)
    with pytest.raises(ConfigError, match="a loss scale already"):
        with_loss_scale(start(2.0))
    with pytest.raises(ConfigError, match=r"start from with_loss_scale"):
        loss_scaling(make_step, grad_fn)(State.create(PARAMS, OPTIMIZER, KEY), BATCH)

    def named(params, batch, key):
        return jnp.float32(1.0), Metrics(jnp.float32(1.0), {"loss_scale": Mean.of(params["v"])})

    with pytest.raises(ConfigError, match="cannot be named 'loss_scale'"):
        scaled_value_and_grad(named)(PARAMS, BATCH, KEY)
