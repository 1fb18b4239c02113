"""What looks inside a function changes no bit of it: on hand-written, linen and nnx models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from law_cases import bits, cases

from fnml.laws import check_loss
from fnml.transforms import (
    Policy,
    autocast,
    capture,
    captured_names,
    checked,
    cost,
    find_nonfinite,
    mixed_precision,
)

CASES = cases()
NAMES = ["mlp", "cnn", "gpt", "linen", "nnx"]


@functools.cache
def plain(name):
    return CASES[name].grads(CASES[name].grad_fn)


def arguments(case):
    return case.params, case.batch, jax.random.key(5)


@pytest.mark.parametrize("name", NAMES)
def test_capture_and_checked_leave_the_bits_of_loss_metrics_and_gradient(name):
    case = CASES[name]
    every = list(captured_names(case.grad_fn, *arguments(case), **case.options))
    few = every[:: max(1, len(every) // 3)]
    exact = capture(case.grad_fn, few, exact=True)
    out, captured = case.grads(exact)
    assert bits(out) == bits(plain(name)) and set(captured) == set(few)
    assert bits(case.grads(checked(case.grad_fn))) == bits(plain(name))
    eager = checked(jax.jit(case.grad_fn))(*arguments(case), **case.options)
    assert bits(eager) == bits(plain(name))


@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_capturing_everything_at_once_changes_roundings_at_most(name):
    case = CASES[name]
    (loss, _), grads = case.grads(capture(case.grad_fn, "**"))[0]
    (expected, _), slopes = plain(name)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    got, right = (
        np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])
        for tree in (grads, slopes)
    )
    assert np.linalg.norm(got - right) <= 1e-5 * np.linalg.norm(right)


@pytest.mark.parametrize("name", NAMES)
def test_counting_and_searching_run_on_every_model(name):
    case = CASES[name]
    found = cost(case.grad_fn, *arguments(case), **case.options)
    assert found.total.flops > cost(case.loss_fn, *arguments(case), **case.options).total.flops
    if name in ("mlp", "linen"):
        assert find_nonfinite(case.grad_fn, *arguments(case), **case.options) is None


@pytest.mark.parametrize("name", ["mlp", "cnn", "linen", "nnx"])
def test_autocast_is_at_least_as_exact_as_casting_everything(name):
    case = CASES[name]

    def error(loss_fn):
        (_, _), grads = case.grads(jax.value_and_grad(loss_fn, has_aux=True))
        got, right = (
            np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])
            for tree in (grads, plain(name)[1])
        )
        return np.linalg.norm(got - right) / np.linalg.norm(right)

    narrow = error(autocast(case.loss_fn, "bfloat16"))
    # A few roundings of 2**-9 each.
    assert 2.0**-13 < narrow < 8 * 2.0**-9
    if name in ("mlp", "cnn"):
        cast = mixed_precision(case.loss_fn, Policy(), keep_inputs=("y", "weights"))
        assert narrow <= 1.5 * error(cast)


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt"])
def test_no_false_alarm_on_the_zoo(name):
    case = CASES[name]
    key = jax.random.key(0) if name == "gpt" else None
    found = check_loss(case.loss_fn, case.params, case.batch, key, **case.options)
    assert [f for f in found if f.status == "broken"] == []
    assert len(found) == 11 and jnp.isfinite(found[1].difference)
