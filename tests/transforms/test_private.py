"""DP-SGD against its definition written out in NumPy, and its accountant against known numbers."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from fnml.core import ConfigError, LayoutError, Mean, Metrics, MissingExtraError
from fnml.transforms import accumulate, data_parallel, privacy_spent, private

RNG = np.random.default_rng(1)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32), "b": jnp.ones(2, jnp.float32)}
X = jnp.asarray(RNG.normal(size=(8, 4)) * np.geomspace(0.1, 10, 8)[:, None], jnp.float32)
KEY = jax.random.key(5)


def loss_fn(params, batch, key):
    loss = Mean.of(jnp.sum((batch @ params["w"] + params["b"][None]) ** 2, axis=1))
    return loss.value, Metrics(loss.weight, {"loss2": loss})


GRAD = jax.value_and_grad(loss_fn, has_aux=True)


def by_hand(clip: float) -> tuple[dict[str, np.ndarray], int]:
    """Clip each example's gradient in float64, formula by formula."""
    w, b, total, cut = np.float64(PARAMS["w"]), np.float64(PARAMS["b"]), None, 0
    for x in np.float64(X):
        out = x @ w + b
        grad = {"w": np.outer(x, 2 * out), "b": 2 * out}
        norm = np.sqrt(sum((g**2).sum() for g in grad.values()))
        cut += norm > clip
        grad = {name: g * min(1.0, clip / norm) for name, g in grad.items()}
        total = grad if total is None else {name: total[name] + grad[name] for name in grad}
    return {name: g / len(X) for name, g in total.items()}, cut


def relative(a, b):
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]).astype(float) for t in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("chunk", [None, 1, 2, 4])
def test_without_noise_it_is_the_mean_of_clipped_gradients(chunk: int | None) -> None:
    expected, cut = by_hand(5.0)
    assert 0 < cut < len(X), "the case has to clip some examples and not others"
    (loss, metrics), grads = private(GRAD, clip=5.0, noise=0.0, chunk=chunk)(PARAMS, X, KEY)
    assert relative(grads, expected) < 1e-6
    assert float(metrics.weight) == 8
    assert float(loss) == pytest.approx(float(GRAD(PARAMS, X, KEY)[0][0]), rel=1e-6)


def test_the_noise_has_the_stated_scale_and_comes_from_the_key() -> None:
    clip, noise = 2.0, 3.0
    silent = private(GRAD, clip=clip, noise=0.0)(PARAMS, X, KEY)[1]

    def draw(key):
        noisy = private(GRAD, clip=clip, noise=noise)(PARAMS, X, key)[1]
        return jnp.concatenate(
            [(a - b).ravel() for a, b in zip(*map(jax.tree.leaves, (noisy, silent)), strict=True)]
        )

    draws = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(KEY, 2000)))
    expected = noise * clip / len(X)
    # 20,000 draws: the standard deviation's own error is 0.5%, so 3% is six of them.
    assert draws.std() == pytest.approx(expected, rel=0.03)
    assert abs(draws.mean()) < 5 * expected / np.sqrt(draws.size)
    correlations = np.corrcoef(draws.T) - np.eye(draws.shape[1])
    assert np.abs(correlations).max() < 0.12, "every parameter needs noise of its own"
    again = private(GRAD, clip=clip, noise=noise)(PARAMS, X, KEY)[1]
    repeat = private(GRAD, clip=clip, noise=noise)(PARAMS, X, KEY)[1]
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(repeat)))


def test_a_layout_inside_changes_nothing_and_adds_noise_once() -> None:
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    laid = private(
        GRAD, clip=5.0, noise=1.0, layout=lambda g: data_parallel(accumulate(g, 2), mesh)
    )
    plain = private(GRAD, clip=5.0, noise=1.0)
    assert relative(laid(PARAMS, X, KEY)[1], plain(PARAMS, X, KEY)[1]) < 1e-6


def test_refusals_say_what_works() -> None:
    with pytest.raises(LayoutError, match=r"layout=lambda g: accumulate"):
        private(accumulate(GRAD, 2), clip=1.0, noise=1.0)
    with pytest.raises(ConfigError, match="clip > 0 and noise >= 0, got 0"):
        private(GRAD, clip=0, noise=1.0)
    with pytest.raises(LayoutError, match="8 examples into chunks of 3"):
        private(GRAD, clip=1.0, noise=1.0, chunk=3)(PARAMS, X, KEY)


def test_the_accountant_knows_the_analytic_special_case() -> None:
    if importlib.util.find_spec("dp_accounting") is None:
        with pytest.raises(MissingExtraError, match="privacy"):
            privacy_spent(noise=1.0, batch_size=1, examples=1, steps=1, delta=1e-5)
        pytest.skip("the extra 'privacy' is not installed")
    # Without sampling, K Gaussian mechanisms are Renyi-DP with K a / (2 sigma^2) at order a; the
    # classical conversion then gives an upper bound that a good accountant stays below.
    sigma, steps, delta = 4.0, 10, 1e-5
    rho = steps / (2 * sigma**2)
    classical = rho + 2 * np.sqrt(rho * np.log(1 / delta))
    spent = privacy_spent(noise=sigma, batch_size=7, examples=7, steps=steps, delta=delta)
    assert 0.7 * classical < spent <= classical * (1 + 1e-6)
    fewer = privacy_spent(noise=sigma, batch_size=1, examples=7, steps=steps, delta=delta)
    assert fewer < spent / 3, "sampling amplifies privacy"


def test_the_accountant_refuses_nonsense() -> None:
    with pytest.raises(ConfigError, match="batch_size=9, examples=7"):
        privacy_spent(noise=1.0, batch_size=9, examples=7, steps=1, delta=1e-5)
