"""``native(f)``: values and gradients to rounding, whatever is done with it; and the layouts' law."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from fnml import Metrics, State, init
from fnml.models import GPTConfig, gpt
from fnml.pallas_kernels import build_native, native_faults
from fnml.train import next_token, train_step
from fnml.transforms import accumulate, data_parallel, native, remat

pytestmark = pytest.mark.skipif(bool(native_faults()), reason="; ".join(native_faults()))

MODEL = gpt(GPTConfig(vocab=64, width=32, layers=2, heads=2))
PARAMS = init(MODEL.spec, jax.random.key(0))
TOKENS = jax.random.randint(jax.random.key(1), (8, 33), 0, 64)
KEY = jax.random.key(2)


def loss_fn(params, tokens, key):
    loss = next_token(MODEL.apply(params, tokens[:, :-1]), tokens[:, 1:])
    return loss.value, Metrics(loss.weight)


def gradient(loss):
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def distance(x, y):
    x, y = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(t)]) for t in (x, y))
    return float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))


@pytest.mark.parametrize(
    "wrap",
    [native, lambda f: remat(native(f)), lambda f: native(remat(f))],
    ids=["native", "remat of native", "native of remat"],
)
def test_value_and_gradient_are_the_same_to_rounding(wrap):
    (value, _), grads = gradient(loss_fn)(PARAMS, TOKENS, KEY)
    wrapped = gradient(wrap(loss_fn))
    program = wrapped.lower(PARAMS, TOKENS, KEY).as_text()
    assert "fnml_attention_forward" in program and "fnml_attention_backward" in program
    (found, _), found_grads = wrapped(PARAMS, TOKENS, KEY)
    assert abs(found - value) < 1e-6 * value
    # Two layers of sums in another order: measured 4e-7.
    assert distance(found_grads, grads) < 3e-6


def test_it_ends_with_the_function():
    wrapped = native(loss_fn)
    wrapped(PARAMS, TOKENS, KEY)
    assert "fnml" not in str(jax.make_jaxpr(loss_fn)(PARAMS, TOKENS, KEY))
    assert "fnml" in str(jax.make_jaxpr(wrapped)(PARAMS, TOKENS, KEY))


def test_micro_batches_and_devices_give_the_same_bits():
    optimizer = optax.adamw(1e-3)
    grad_fn = jax.value_and_grad(native(loss_fn), has_aux=True)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))

    def after(form):
        step = jax.jit(train_step(form, optimizer))
        state, _ = step(State.create(PARAMS, optimizer, KEY), TOKENS)
        return jax.tree.leaves(state.params)

    expected = after(accumulate(grad_fn, 4))
    for x, y in zip(expected, after(data_parallel(accumulate(grad_fn, 2), mesh)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_run_repeats_bit_for_bit():
    run = gradient(native(loss_fn))
    first, *others = (run(PARAMS, TOKENS, KEY)[1] for _ in range(4))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, other, first)


def test_vmapped_it_runs_no_body_in_cpp():
    params = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), PARAMS)

    def mapped(loss):
        return jax.jit(jax.vmap(jax.grad(loss, has_aux=True), (0, None, None)))

    wrapped = mapped(native(loss_fn))
    assert "fnml_" not in wrapped.lower(params, TOKENS, KEY).as_text()
    found, expected = (run(params, TOKENS, KEY)[0] for run in (wrapped, mapped(loss_fn)))
    assert distance(found, expected) < 3e-6


def test_a_gradient_takes_the_library_that_was_given(tmp_path):
    given = tmp_path / "libfnml-given.so"
    shutil.copy(build_native(), given)
    program = gradient(native(loss_fn, given)).lower(PARAMS, TOKENS, KEY).as_text()
    names = set(re.findall(r"fnml_attention_\w+-\w+", program))
    assert names == {"fnml_attention_forward-given", "fnml_attention_backward-given"}


def test_where_devices_are_told_apart_it_leaves_all_as_it_is():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    data, everywhere = jax.P("data"), jax.P()

    def mapped(function):
        def value(params, tokens):
            return jax.lax.pmean(function(params, tokens, KEY)[0], "data")

        return jax.jit(
            jax.shard_map(value, mesh=mesh, in_specs=(everywhere, data), out_specs=everywhere)
        )

    found, expected = (mapped(f)(PARAMS, TOKENS) for f in (native(loss_fn), loss_fn))
    assert abs(found - expected) < 1e-6 * expected
