"""The contract of every model: a new one is one row of ``ZOO``."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnml.core import Mean, Model, Param, abstract, count, init, leaf_names
from fnml.models import (
    CNNConfig,
    EncoderConfig,
    GPTConfig,
    MLPConfig,
    ResNetConfig,
    cnn,
    encoder,
    gpt,
    mlp,
    resnet,
)


class Row(NamedTuple):
    """One model, a batch for it, and its number of parameters by hand."""

    model: Model
    inputs: Callable[[jax.Array], jax.Array]
    logits: tuple[int, ...]
    parameters: int
    dropout: bool


def _images(key):
    return jax.random.normal(key, (4, 6, 6, 2))


def _tokens(key):
    return jax.random.randint(key, (4, 9), 0, 11)


def _gpt_parameters(vocab, width, layers, heads, kv_heads, mlp_width):
    attention = 2 * width * width + 2 * width * (width // heads) * kv_heads
    return 2 * vocab * width + layers * (attention + 3 * width * mlp_width + 2 * width) + width


ZOO = {
    "mlp": Row(
        mlp(MLPConfig(inputs=72, hidden=(16, 8), outputs=5, dropout=0.2)),
        _images,
        (4, 5),
        72 * 16 + 16 + 16 * 8 + 8 + 8 * 5 + 5,
        True,
    ),
    "cnn": Row(
        cnn(CNNConfig(classes=5, channels=2, widths=(3, 4), pool=2, dropout=0.2)),
        _images,
        (4, 5),
        # stem, a block of 3 channels, a block from 3 to 4 with its shortcut, head
        (9 * 2 * 3 + 6) + 2 * (9 * 9 + 6) + (9 * 12 + 8 + 9 * 16 + 8 + 12 + 8) + (4 * 5 + 5),
        True,
    ),
    "resnet": Row(
        resnet(ResNetConfig(classes=5, channels=2, widths=(16, 20), blocks=(1, 1))),
        _images,
        (4, 5),
        # stem, a block of 16 channels, a block from 16 to 20 with its shortcut, head
        (9 * 2 * 16 + 32)
        + 2 * (9 * 16 * 16 + 32)
        + (9 * 16 * 20 + 40 + 9 * 20 * 20 + 40 + 16 * 20 + 40)
        + (20 * 5 + 5),
        False,
    ),
    "gpt": Row(
        gpt(GPTConfig(vocab=11, width=16, layers=3, heads=4, kv_heads=2, context=16, mlp_width=24)),
        _tokens,
        (4, 9, 11),
        _gpt_parameters(11, 16, 3, 4, 2, 24),
        False,
    ),
    "encoder": Row(
        encoder(EncoderConfig(vocab=11, width=8, layers=2, heads=2, context=9, dropout=0.3)),
        _tokens,
        (4, 9, 8),
        # tables and their norm; attention, feed-forward and two norms in each layer
        (11 + 9 + 2) * 8 + 2 * (4 * (64 + 8) + (8 * 32 + 32 + 32 * 8 + 8) + 4 * 8),
        True,
    ),
    "gpt with dropout": Row(
        gpt(GPTConfig(vocab=11, width=8, layers=2, heads=2, context=9, dropout=0.3, unroll=1)),
        _tokens,
        (4, 9, 11),
        _gpt_parameters(11, 8, 2, 2, 2, 32),
        True,
    ),
}


@pytest.fixture(params=ZOO, scope="module")
def row(request):
    return ZOO[request.param]


@pytest.fixture(scope="module")
def params(row):
    return init(row.model.spec, jax.random.key(0))


@pytest.fixture(scope="module")
def inputs(row):
    return row.inputs(jax.random.key(1))


def _caller(row: Row, train: bool) -> Callable[..., Any]:
    """Give every model one signature: (params, inputs, key) -> (logits, stats)."""
    if not jax.tree.leaves(row.model.state):
        return lambda params, x, key=None: (row.model.apply(params, x, key=key), ())
    state = init(row.model.state, jax.random.key(0))
    return lambda params, x, key=None: row.model.apply(params, x, state=state, train=train, key=key)


@pytest.fixture(scope="module")
def call(row):
    return _caller(row, train=True)


@pytest.fixture(scope="module")
def jitted(call):
    return jax.jit(call)


def _loss(call):
    return lambda params, x, key=None: jnp.sin(call(params, x, key)[0]).mean()


def _assert_close(got, want, bound):
    def check(a, b):
        assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b) + 1e-7

    jax.tree.map(check, got, want)


def test_apply_is_pure_and_float32(row, params, inputs, jitted):
    first, second = jitted(params, inputs), jitted(params, inputs)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert first[0].shape == row.logits
    assert first[0].dtype == jnp.float32
    assert np.isfinite(first[0]).all()


def test_jit_changes_only_rounding(params, inputs, call, jitted):
    # XLA fuses under jit; a few dozen float32 roundings differ.
    _assert_close(jitted(params, inputs), call(params, inputs), 1e-5)


def test_eval_shape_agrees_with_the_spec_and_the_outputs(row, params, inputs, call, jitted):
    shapes = abstract(row.model.spec)
    assert jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params) == shapes
    predicted = jax.eval_shape(call, shapes, inputs)
    got = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), jitted(params, inputs))
    assert predicted == got


def test_names_are_unique_and_the_count_is_that_of_the_formula(row, params):
    names = leaf_names(row.model.spec)
    assert len(set(names)) == len(names)
    assert all(isinstance(leaf, Param) for leaf in jax.tree.leaves(row.model.spec))
    assert count(row.model.spec) == count(params) == row.parameters


def test_every_axis_has_a_known_name(row):
    known = {"embed", "mlp", "heads", "kv_heads", "head_dim", "vocab", "layers"}
    known |= {"conv_in", "conv_out", None}
    for param in jax.tree.leaves((row.model.spec, row.model.state)):
        assert set(param.axes) <= known


def test_adding_a_parameter_changes_no_other(row, params):
    larger = {"adapter": Param((3,), (None,), jax.nn.initializers.normal()), **row.model.spec}
    again = init(larger, jax.random.key(0))
    again.pop("adapter")
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_every_parameter_gets_a_gradient_and_checkpoint_keeps_it(params, inputs, call):
    loss = _loss(call)
    grads = jax.jit(jax.grad(loss))(params, inputs)
    assert all(np.isfinite(g).all() and (g != 0).any() for g in jax.tree.leaves(grads))
    again = jax.jit(jax.grad(jax.checkpoint(loss)))(params, inputs)
    _assert_close(again, grads, 1e-5)


def test_a_scan_over_steps_has_the_bits_of_a_loop(params, inputs, call):
    grad = jax.grad(_loss(call))
    batches = jnp.stack([inputs, inputs[::-1]])

    def step(params, x):
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grad(params, x)), None

    looped = params
    compiled = jax.jit(step)
    for x in batches:
        looped, _ = compiled(looped, x)
    scanned, _ = jax.jit(lambda params, xs: jax.lax.scan(step, params, xs))(params, batches)
    jax.tree.map(np.testing.assert_array_equal, scanned, looped)


def test_vmap_over_parameters_and_over_examples(row, params, inputs):
    call = _caller(row, train=False)
    value_and_grad = jax.value_and_grad(_loss(call))

    @jax.jit
    def mapped(params, x):
        members = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
        ensemble = jax.vmap(lambda params: call(params, x)[0])(members)
        return ensemble, jax.vmap(lambda x: value_and_grad(params, x[None]))(x)

    @jax.jit
    def plain(params, x):
        return call(params, x)[0], value_and_grad(params, x)

    ensemble, per_example = mapped(params, inputs)
    logits, whole = plain(params, inputs)
    _assert_close(ensemble[0], logits, 1e-5)
    assert not np.allclose(ensemble[1], logits)
    _assert_close(jax.tree.map(lambda a: a.mean(0), per_example), whole, 1e-4)


def test_a_key_draws_and_none_does_not(row, params, inputs, jitted):
    plain = jitted(params, inputs)[0]
    keys = [jax.random.key(seed) for seed in (0, 0, 1)]
    first, same, other = (jitted(params, inputs, key)[0] for key in keys)
    np.testing.assert_array_equal(first, same)
    assert (first != plain).any() == row.dropout
    assert (first != other).any() == row.dropout


def test_statistics_have_the_structure_of_the_state(row, params, inputs, call):
    stats = call(params, inputs)[1]
    values = jax.tree.map(
        lambda mean: mean.value, stats, is_leaf=lambda leaf: isinstance(leaf, Mean)
    )
    state = init(row.model.state, jax.random.key(0))
    assert jax.tree.structure(values) == jax.tree.structure(state)
    assert jax.tree.map(jnp.shape, values) == jax.tree.map(jnp.shape, state)
    assert _caller(row, train=False)(params, inputs)[1] == ()


def test_bfloat16_parameters_compute_in_bfloat16_near_float32(row, params, inputs, jitted):
    small = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    x = inputs.astype(jnp.bfloat16) if inputs.dtype == jnp.float32 else inputs
    got, want = jitted(small, x)[0], jitted(params, inputs)[0]
    assert got.dtype == jnp.float32
    assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)
    assert (got != want).any()
