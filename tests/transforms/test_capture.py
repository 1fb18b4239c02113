"""Capture: names, values against the program written out, and results that do not change."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from walk_programs import PROGRAMS, WS, X

from fnml.core import ConfigError
from fnml.transforms import array_stats, capture, captured_names


def hidden_by_hand(ws, x):
    """The values named ``hidden`` of each layer, in NumPy float64."""
    found, x = [], np.asarray(x, np.float64)
    for w in np.asarray(ws, np.float64):
        found.append(np.tanh(x @ w))
        x = x + found[-1]
    return np.stack(found)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("exact", [False, True])
def test_results_do_not_change(name, exact):
    f = PROGRAMS[name]
    names = list(captured_names(f, WS, X))
    out, captured = jax.jit(capture(f, names, exact=exact))(WS, X)
    assert set(captured) == set(names) and names
    plain = jax.jit(f)(WS, X)
    if exact:
        assert np.array_equal(out, plain)
    np.testing.assert_allclose(out, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", PROGRAMS)
def test_when_nothing_is_captured_the_jaxpr_is_unchanged(name):
    f = PROGRAMS[name]
    off = jax.make_jaxpr(lambda *args: capture(f, ())(*args)[0])(WS, X)
    plain = jax.make_jaxpr(f)(WS, X)
    assert re.sub("0x[0-9a-f]+", "", str(off)) == re.sub("0x[0-9a-f]+", "", str(plain))


@pytest.mark.parametrize("name", ["loops", "remats", "backwards"])
def test_inside_a_scan_values_are_stacked_by_layer(name):
    x = jnp.sin(X) if name == "remats" else X
    ws = WS[::-1] if name == "backwards" else WS
    expected = hidden_by_hand(ws, x)[:: -1 if name == "backwards" else 1]
    captured = capture(PROGRAMS[name], "**/hidden")(WS, X)[1]
    assert list(captured) == ["mlp/hidden"]
    np.testing.assert_allclose(captured["mlp/hidden"], expected, rtol=1e-5)


def test_the_last_turn_of_a_while_and_the_branch_that_was_taken():
    grown = capture(PROGRAMS["turns"], "grown")(WS, X)
    assert np.array_equal(grown[0], grown[1]["grown"])
    taken = capture(PROGRAMS["branches"], "taken")
    for x in (X, -X):
        y = np.asarray(x @ WS[0], np.float64)
        value = taken(WS, x)[1]["taken"]
        expected = np.sin(y) if np.sum(x) > 0 else np.full(y.shape, np.nan)
        np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_every_device_of_a_shard_map_gives_a_row():
    local = capture(PROGRAMS["shards"], "local")(WS, X)[1]["local"]
    np.testing.assert_allclose(local, np.cos(np.asarray(X @ WS[0], np.float64)), rtol=1e-5)


def test_under_vmap_and_of_a_function_that_is_vmapped():
    inner = jax.vmap(capture(PROGRAMS["loops"], "**/hidden"), in_axes=(None, 0))
    outer = capture(PROGRAMS["maps"], "**/hidden")
    one = inner(WS, X[:, None])[1]["mlp/hidden"]
    other = outer(WS, X)[1]["mlp/hidden"]
    assert one.shape == (2, 3, 1, 4) and other.shape == (3, 2, 1, 4)
    np.testing.assert_allclose(one, jnp.moveaxis(other, 1, 0), rtol=1e-6)


def test_of_a_gradient_and_under_a_gradient():
    def loss(ws, x):
        return jnp.mean(PROGRAMS["loops"](ws, x) ** 2)

    (value, slope), captured = capture(jax.value_and_grad(loss), "**/hidden")(WS, X)
    np.testing.assert_allclose(captured["mlp/hidden"], hidden_by_hand(WS, X), rtol=1e-5)
    aux = jax.value_and_grad(capture(loss, "**/hidden"), has_aux=True)
    (same, other), slopes = aux(WS, X)
    np.testing.assert_allclose(other["mlp/hidden"], captured["mlp/hidden"], rtol=1e-6)
    np.testing.assert_allclose(slopes, slope, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(same, value, rtol=1e-6)
    assert any(n.startswith("backward") for n in captured_names(jax.grad(loss), WS, X))


def test_a_derivative_of_its_own_stays_in_force_beside_what_is_captured():
    @jax.custom_vjp
    def odd(x):
        return jnp.sin(x)

    odd.defvjp(lambda x: (jnp.sin(x), None), lambda _, g: (7.0 * g,))
    f = capture(lambda x: odd(x) + 1, "**/odd")
    slope, captured = jax.grad(f, has_aux=True)(0.5)
    assert slope == 7.0 and list(captured) == ["odd"]
    assert captured["odd"] == pytest.approx(np.sin(0.5), 1e-6)
    assert jax.grad(lambda x: f(x)[1]["odd"])(0.5) == 0.0


def test_functions_and_scopes_give_names_and_equal_names_are_numbered():
    def block(x):
        with jax.named_scope("inner"):
            y = jnp.sin(x)
        return y + 1

    def model(x):
        first = block(x)
        return block(first) * 2

    assert list(captured_names(model, 1.0)) == [
        *("inner", "model/block", "inner.1", "model/block.1", "model"),
    ]
    captured = capture(model, ["inner.1", "model/block"])(1.0)[1]
    assert captured["model/block"] == pytest.approx(np.sin(1.0) + 1, 1e-6)
    assert captured["inner.1"] == pytest.approx(np.sin(np.sin(1.0) + 1), 1e-6)


def test_calls_in_a_python_loop_are_told_apart_and_loops_inside_a_function_are_not():
    def block(x):
        for _ in range(2):
            x = jnp.sin(x)
            x = x * 2
        return x + 1

    def model(x):
        for _ in range(3):
            x = block(x)
            x = -x
        return x

    captured = capture(model, "model/block*")(1.0)[1]
    expected, x = [], 1.0
    for _ in range(3):
        expected.append(2 * np.sin(2 * np.sin(x)) + 1)
        x = -expected[-1]
    assert list(captured) == ["model/block", "model/block.1", "model/block.2"]
    np.testing.assert_allclose(list(captured.values()), expected, rtol=1e-5)


def test_statistics_are_those_of_numpy():
    def f(x):
        return lax.map(lambda v: jax.ad_checkpoint.checkpoint_name(v * 2, "doubled"), x)

    x = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    x[1, :5], x[2, 7] = 0, np.inf
    stats = capture(f, "doubled", stats=True, bins=8)(x)[1]["doubled"]
    for i, row in enumerate(2 * x.astype(np.float64)):
        kept = row[np.isfinite(row)]
        expected = (kept.mean(), kept.std(), kept.min(), kept.max(), np.mean(row == 0))
        got = [float(field[i]) for field in stats[:5]]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
        assert int(stats.nonfinite[i]) == row.size - kept.size
        counts, edges = np.histogram(kept.astype(np.float32), 8)
        assert np.array_equal(stats.counts[i], counts)
        np.testing.assert_allclose(stats.edges[i], edges, rtol=1e-5, atol=1e-6)


def test_statistics_of_nothing_finite_do_not_fail():
    stats = array_stats(jnp.full(3, jnp.nan))
    assert int(stats.nonfinite) == 3 and int(jnp.sum(stats.counts)) == 0
    assert np.isnan(stats.mean) and np.isnan(stats.min)


def test_a_name_that_is_not_there_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'mlp/hiden' matches none.*'mlp/hidden'"):
        capture(PROGRAMS["loops"], "mlp/hiden")(WS, X)
