"""``fnml check grad``: a right gradient passes, a wrong one is named with its parameter."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from user_losses import DRAWING, GOOD, WRONG_VJP

from fnml import Metrics
from fnml.cli import main
from fnml.core import ConfigError
from fnml.laws import check_grad


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(name, source, *arguments):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(SystemExit) as stopped:
            main(["check", "grad", f"{name}:loss_fn", *arguments])
        out = capsys.readouterr()
        return stopped.value.code, out.out + out.err

    return run


def test_a_right_gradient_passes(check):
    code, text = check("right_gradient", GOOD)
    assert code == 0, text
    assert "hidden/kernel" in text and "scale" in text and "broken" not in text


def test_a_custom_vjp_that_is_wrong_by_a_thousandth_is_named(check):
    code, text = check("wrong_gradient", WRONG_VJP)
    assert code == 1
    assert "1 of 2 broken: scale" in text and "custom_vjp" in text
    # Six random directions estimate the error of 0.001 of the norm, within a factor.
    assert re.search(r"scale .* broken .* ([5-9]\.\de-04|[12]\.\de-03) ", text), text


def test_a_loss_that_draws_is_checked_with_its_key(check):
    keyed = DRAWING.replace("return params, batch\n", "return params, batch, jax.random.key(1)\n")
    code, text = check("drawing_gradient", keyed)
    assert code == 0, text


def test_only_grad_can_be_checked(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["check", "gard", "m:f"])
    assert stopped.value.code == 2
    assert "cannot check 'gard'. Did you mean 'grad'?" in capsys.readouterr().err


def scan_loss(params, batch, key):
    """Control flow of every kind, computed in bfloat16 in places."""
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x * w), None), batch, params["layers"])[0]
    x = jax.lax.cond(jnp.sum(x) > 100, jnp.zeros_like, lambda x: x * params["gain"], x)
    x = jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x), x)
    return jnp.mean(x), Metrics(jnp.float32(x.size))


PARAMS = {"layers": jnp.linspace(0.5, 1.5, 4), "gain": jnp.float32(1.5)}
BATCH = np.linspace(-1, 2, 6, dtype=np.float32)


def test_differences_are_in_float64_through_control_flow_whatever_the_loss_casts_to():
    found = check_grad(scan_loss, PARAMS, BATCH)
    assert {f.law for f in found} == {"layers", "gain"}
    # Float32 differences would be off by about 1e-3.
    assert all(f.status == "held" and f.difference < 1e-5 for f in found), found


def test_a_loss_in_bfloat16_has_a_wider_bound_and_a_wrong_sign_is_still_found():
    def half(params, batch, key):
        wide, metrics = scan_loss(
            jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), batch.astype(jnp.bfloat16), key
        )
        return wide.astype(jnp.float32), metrics

    @jax.custom_jvp
    def flip(x):
        return x

    flip.defjvp(lambda primals, tangents: (primals[0], -tangents[0]))
    found = check_grad(half, PARAMS, BATCH)
    assert all(f.status == "held" and f.bound > 0.05 for f in found), found

    def flipped(params, batch, key):
        return half({**params, "gain": flip(params["gain"])}, batch, key)

    worst = check_grad(flipped, PARAMS, BATCH)[0]
    assert (worst.law, worst.status) == ("gain", "broken") and worst.difference == pytest.approx(
        2, 0.1
    )


def test_one_wrong_coordinate_is_located():
    @jax.custom_jvp
    def bent(x):
        return x

    flat = jnp.array([1.0, 1.0, 3.0, 1.0])
    bent.defjvp(lambda primals, tangents: (primals[0], tangents[0] * flat))

    def loss_fn(params, batch, key):
        return jnp.mean(bent(params) * batch), Metrics(jnp.float32(1))

    [finding] = check_grad(loss_fn, jnp.ones(4), np.arange(1, 5, dtype=np.float32))
    assert finding.law == "params" and finding.status == "broken"
    assert "at [2] the gradient says 2.25, the loss's slope is 0.75" in finding.meaning


def test_a_gradient_that_is_not_finite_is_named():
    def loss_fn(params, batch, key):
        return jnp.sum(jnp.sqrt(params * batch)), Metrics(jnp.float32(1))

    [finding] = check_grad(loss_fn, jnp.array([1.0, 0.0]), np.ones(2, np.float32))
    assert finding.status == "broken" and "not finite, first at [1]" in finding.meaning


def test_parameters_that_cannot_be_checked_are_refused():
    with pytest.raises(ConfigError, match="no floating-point parameter"):
        check_grad(lambda p, b, k: (jnp.sum(b), Metrics(jnp.float32(1))), jnp.arange(3), BATCH)
