"""The walker: a walk that changes nothing is the same jaxpr; what is rewritten, is everywhere."""

import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from walk_programs import DIFFERENTIABLE, PROGRAMS, WS, X

from fnml.transforms._flow import flow
from fnml.transforms._walk import Rules, trace, walk


def printed(closed):
    return re.sub(r"0x[0-9a-f]+", "", str(closed))


def walked(function, rules):
    def again(*args):
        traced = trace(function, args, {})
        return jax.tree.unflatten(traced.tree, walk(traced.closed, traced.flat, rules)[0])

    return again


IDENTITY = Rules(rewrite=lambda eqn, values: None)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_walk_that_changes_nothing_gives_the_same_jaxpr(name):
    plain = jax.make_jaxpr(PROGRAMS[name])(WS, X)
    again = jax.make_jaxpr(walked(PROGRAMS[name], IDENTITY))(WS, X)
    assert printed(again) == printed(plain)
    assert again.in_avals == plain.in_avals and again.out_avals == plain.out_avals


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_gradient_through_a_walk_has_the_bits_of_the_gradient(name):
    def total(function):
        return jax.jit(jax.grad(lambda ws, x: jnp.sum(function(ws, x)), (0, 1)))

    plain = total(PROGRAMS[name])(WS, X)
    again = total(walked(PROGRAMS[name], IDENTITY))(WS, X)
    assert all(map(np.array_equal, plain, again))


def twice_the_cosine(eqn, values):
    return [2 * jnp.cos(values[0])] if eqn.primitive.name == "sin" else None


@pytest.mark.parametrize("wrap", ["plain", "jit", "scan", "while", "cond", "remat", "vmap"])
def test_an_operation_is_rewritten_in_every_body(wrap):
    f = {
        "plain": jnp.sin,
        "jit": jax.jit(jnp.sin),
        "scan": lambda x: lax.scan(lambda c, _: (c, jnp.sin(x)), 0.0, None, length=1)[1][0],
        "while": lambda x: lax.while_loop(
            lambda c: c[0] < 1, lambda c: (c[0] + 1, jnp.sin(x)), (0, x)
        )[1],
        "cond": lambda x: lax.cond(x[0] > 0, jnp.sin, jnp.cos, x),
        "remat": jax.checkpoint(jnp.sin),
        "vmap": jax.vmap(jnp.sin),
    }[wrap]
    x = jnp.array([0.3, 0.4])
    got = jax.jit(walked(f, Rules(twice_the_cosine)))(x)
    np.testing.assert_allclose(got, 2 * np.cos(np.asarray(x, np.float64)), rtol=1e-6)


def test_a_derivative_of_its_own_is_rewritten_with_its_function():
    @jax.custom_vjp
    def f(x):
        return jnp.sin(x)

    f.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.sin(x) * 100,))
    value, slope = jax.value_and_grad(walked(f, Rules(twice_the_cosine)))(0.5)
    assert value == pytest.approx(2 * np.cos(0.5), 1e-6)
    assert slope == pytest.approx(200 * np.cos(0.5), 1e-6)


def test_a_body_that_is_shared_is_rebuilt_once():
    seen = []

    def count(eqn, values):
        seen.append(eqn.primitive.name)

    inner = jax.jit(lambda x: jnp.sin(x))
    walked(lambda x: inner(inner(inner(x))), Rules(count))(1.0)
    assert seen.count("sin") == 1 and seen.count("jit") == 3


STEPS = {
    "sin": jnp.sin,
    "jit": jax.jit(lambda x: x * 2 + 1),
    "scan": lambda x: lax.scan(lambda c, _: (jnp.tanh(c), c), x, None, length=2)[0],
    "cond": lambda x: lax.cond(jnp.sum(x) > 0, lambda x: -x, lambda x: x * x, x),
    "remat": jax.checkpoint(lambda x: jnp.cos(x) * x),
    "relu": jax.nn.relu,
    "vmap": jax.vmap(lambda v: v - 1),
}


@hypothesis.settings(max_examples=25)
@hypothesis.given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=5), st.booleans())
def test_any_program_of_steps_walks_to_itself(names, differentiate):
    def program(x):
        for name in names:
            x = STEPS[name](x)
        return jnp.sum(x)

    f = jax.grad(program) if differentiate else program
    x = jnp.array([0.5, -0.25, 1.5])
    plain = jax.make_jaxpr(f)(x)
    assert printed(jax.make_jaxpr(walked(f, IDENTITY))(x)) == printed(plain)


def test_labels_travel_through_loops_and_branches():
    def f(a, b, c, d):
        x, ys = lax.scan(lambda x, y: (x[::-1], y), (a, b), c)
        z = lax.cond(d > 0, lambda: x[0], lambda: 0.0)
        return x[0], ys, z, lax.while_loop(lambda v: v < 10, lambda v: v + 1, b)

    closed = jax.make_jaxpr(f)(1.0, 2.0, jnp.ones(3), 4.0)
    labels = [frozenset(name) for name in "abcd"]
    assert ["".join(sorted(s)) for s in flow(closed, labels)] == ["ab", "c", "abd", "b"]
