"""Adam in C++ within a native step: what Optax gives, the same state, and where it is not taken."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from fnml import Mean, Metrics, State, init
from fnml.models import MLPConfig, mlp
from fnml.pallas_kernels import native_faults, native_kernels
from fnml.train import OptimizerConfig, adamw, cross_entropy, optimizer, train_step
from fnml.transforms import accumulate, data_parallel, fuse, native

pytestmark = pytest.mark.skipif(bool(native_faults()), reason="; ".join(native_faults()))

MODEL = mlp(MLPConfig(inputs=6, hidden=(5,), outputs=3))
PARAMS = init(MODEL.spec, jax.random.key(0))
BATCHES = [
    (jax.random.normal(jax.random.key(i), (8, 6)), jnp.arange(8, dtype=jnp.int32) % 3)
    for i in range(4)
]
ADAMW = OptimizerConfig("adamw", 0.01, "cosine", warmup=2, weight_decay=0.3)
TAKEN = "fnml_adamw"


def loss_fn(params, batch, key):
    x, labels = batch
    loss = cross_entropy(MODEL.apply(params, x), labels)
    return loss.value, Metrics(loss.weight)


def started(config, params=PARAMS):
    rule = optimizer(config, len(BATCHES))
    step = train_step(jax.value_and_grad(loss_fn, has_aux=True), rule)
    return step, State.create(params, rule, jax.random.key(1))


def after(step, state):
    run = jax.jit(step)
    for batch in BATCHES:
        state, _ = run(state, batch)
    return state


def text(step, state):
    return jax.jit(step).lower(state, BATCHES[0]).as_text()


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    data = [jax.tree.leaves((x.params, x.opt_state)) for x in (found, expected)]
    for x, y in zip(*data, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig("adam", 0.01, "linear", warmup=0),
        OptimizerConfig("adam", 0.01, "cosine", warmup=2, b1=0.8, b2=0.99, clip=0.01),
        ADAMW,
        OptimizerConfig("adamw", 0.01, "constant", warmup=0, weight_decay=0.3, decay=("**/bias",)),
    ],
    ids=["adam", "adam-clipped", "adamw", "adamw-decay-of-biases"],
)
def test_a_native_step_gives_what_optax_gives(config):
    step, state = started(config)
    assert TAKEN not in text(step, state)
    program = text(native(step), state)
    # All arrays in one call.
    assert program.count(TAKEN) == 1
    rule = optax.GradientTransformation(*optimizer(config, len(BATCHES)))
    textbook = train_step(jax.value_and_grad(loss_fn, has_aux=True), rule)
    found, expected = after(native(step), state), after(textbook, state)
    assert_same_bits(after(step, state), expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        if jnp.issubdtype(x.dtype, jnp.floating):
            # A few roundings a step; a gradient near 0 makes more of its own.
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)
        elif not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "mask", [None, lambda params: jax.tree.map(lambda p: p.ndim > 1, params)], ids=["all", "some"]
)
def test_outside_it_has_the_bits_of_optax_and_its_state(mask):
    settings = {"eps": 1e-3, "weight_decay": 0.3, "mask": mask}
    rules = adamw(0.01, 0.8, 0.95, **settings), optax.adamw(0.01, 0.8, 0.95, **settings)
    steps = [train_step(jax.value_and_grad(loss_fn, has_aux=True), rule) for rule in rules]
    found, expected = (
        after(step, State.create(PARAMS, rule, jax.random.key(1)))
        for step, rule in zip(steps, rules, strict=True)
    )
    assert_same_bits(found, expected)
    within = after(native(steps[0]), State.create(PARAMS, rules[0], jax.random.key(1)))
    for x, y in zip(*map(jax.tree.leaves, (within.params, expected.params)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
        assert x.size == 1 or not (x == y).all()


def test_steps_in_one_dispatch_give_the_same_bits():
    step, state = started(ADAMW)
    batches = jax.tree.map(lambda *x: jnp.stack(x), *BATCHES)
    fused = jax.jit(fuse(native(step), len(BATCHES)))
    assert TAKEN in fused.lower(state, batches).as_text()
    assert_same_bits(fused(state, batches)[0], after(native(step), state))


def test_micro_batches_and_devices_give_the_same_bits():
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    rule = optimizer(ADAMW, 4)
    forms = accumulate(grad_fn, 4), data_parallel(accumulate(grad_fn, 2), mesh)
    steps = [native(train_step(form, rule)) for form in forms]
    state = State.create(PARAMS, rule, jax.random.key(1))
    assert all(TAKEN in text(step, state) for step in steps)
    assert_same_bits(*(after(step, state) for step in steps))


def test_a_donated_state_is_updated_in_its_memory():
    step, state = started(ADAMW)
    expected = after(native(step), state)
    run = jax.jit(native(step), donate_argnums=0)
    own = jax.tree.map(jnp.copy, state)
    for batch in BATCHES:
        before = own.params["hidden"][0]["kernel"].unsafe_buffer_pointer()
        own, _ = run(own, batch)
        assert own.params["hidden"][0]["kernel"].unsafe_buffer_pointer() == before
    assert_same_bits(own, expected)


def test_other_dtypes_and_what_is_vmapped_take_the_usual_form():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    batch = BATCHES[0][0].astype(jnp.bfloat16), BATCHES[0][1]
    step, state = started(ADAMW, half)
    assert TAKEN not in jax.jit(native(step)).lower(state, batch).as_text()

    rule = optimizer(ADAMW, 4)
    several = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)
    grads = jax.tree.map(jnp.cos, several)
    opt_state = jax.vmap(rule.init)(several)
    update = jax.jit(jax.vmap(rule.apply))
    with native_kernels(), jax.numpy_dtype_promotion("standard"):
        assert TAKEN not in update.lower(grads, opt_state, several).as_text()
        found, _ = update(grads, opt_state, several)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(jax.vmap(rule.update))(grads, opt_state, several)
    expected = optax.apply_updates(several, updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, expected)


def test_a_learning_rate_can_be_learnt_through_it():
    rule = optimizer(OptimizerConfig("adam", 0.01, "constant", warmup=0), 4)
    grads = jax.tree.map(jnp.cos, PARAMS)

    def moved(scale):
        with jax.numpy_dtype_promotion("standard"):
            start = jax.tree.map(lambda p: p * scale, PARAMS)
            params, _ = rule.apply(grads, rule.init(PARAMS), start)
        return Mean.of(params["head"]["kernel"]).value

    with native_kernels():
        assert TAKEN in jax.jit(moved).lower(1.0).as_text()
        slope = jax.jit(jax.grad(moved))(1.0)
    np.testing.assert_allclose(slope, PARAMS["head"]["kernel"].mean(), rtol=1e-5)
