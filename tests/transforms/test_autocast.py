"""Autocast against casts written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from walk_programs import DIFFERENTIABLE, PROGRAMS, WS, X

from fnml.core import ConfigError, LayoutError
from fnml.transforms import accumulate, autocast


def product(x, w, dtype):
    return jax.lax.dot(x.astype(dtype), w.astype(dtype), preferred_element_type=dtype).astype(
        jnp.float32
    )


def network(dot):
    def loss(ws, x):
        for w in ws:
            x = jax.nn.softmax(dot(x, w)) * 4
        return jnp.mean(jnp.log(x))

    return loss


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_has_the_bits_of_casts_by_hand_and_so_has_its_gradient(dtype):
    plain = network(lambda x, w: x @ w)
    by_hand = network(lambda x, w: product(x, w, dtype))
    got, grads = jax.jit(jax.value_and_grad(autocast(plain, dtype)))(WS, X)
    expected, slopes = jax.jit(jax.value_and_grad(by_hand))(WS, X)
    assert np.array_equal(got, expected) and np.array_equal(grads, slopes)
    assert grads.dtype == jnp.float32
    # It is narrow at all: three roundings of 2**-8 or 2**-11 each.
    exact = jax.jit(jax.grad(plain))(WS, X)
    error = float(jnp.linalg.norm(grads - exact) / jnp.linalg.norm(exact))
    assert 0.01 * 2.0**-8 < error < 8 * 2.0**-8


def dtypes_of(closed, name):
    found = set()

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == name:
                found.update(str(v.aval.dtype) for v in eqn.invars)
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                visit(inner)

    visit(closed.jaxpr)
    return found


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_every_product_is_narrow_forward_and_backward_in_every_body(name):
    cast = autocast(PROGRAMS[name])
    closed = jax.make_jaxpr(jax.grad(lambda ws, x: jnp.sum(cast(ws, x))))(WS, X)
    assert dtypes_of(closed, "dot_general") == {"bfloat16"}


def test_sums_of_a_narrow_function_are_wide():
    def f(x):
        return jnp.exp(x) / jax.lax.reduce_sum_p.bind(x, axes=(0,), out_sharding=None)

    x = jnp.full(1000, 1.01, jnp.bfloat16)
    closed = jax.make_jaxpr(autocast(f))(x)
    assert dtypes_of(closed, "reduce_sum") == {"float32"} == dtypes_of(closed, "exp")
    assert closed.out_avals[0].dtype == jnp.bfloat16


def test_the_table_can_be_changed():
    x = jnp.ones((2, 2))
    off = autocast(lambda x: x @ x, table={"dot_general": None})
    assert str(jax.make_jaxpr(off)(x)) == str(jax.make_jaxpr(lambda x: x @ x)(x))
    tanh = autocast(jnp.tanh, "float16", table={"tanh": "narrow"})
    assert dtypes_of(jax.make_jaxpr(tanh)(x), "tanh") == {"float16"}


def test_what_is_wrong_with_a_table_is_said_all_at_once():
    with pytest.raises(ConfigError) as caught:
        autocast(jnp.sin, "int8", table={"dot_generel": "narrow", "sin": "int32"})
    text = str(caught.value)
    assert "dtype='int8'" in text and "'dot_general'?" in text and "table['sin']='int32'" in text


def test_a_gradient_function_with_a_layout_is_refused():
    with pytest.raises(LayoutError, match="autocast changes how a loss is computed"):
        autocast(accumulate(jax.value_and_grad(lambda p, b, k: p, has_aux=True), 2))
