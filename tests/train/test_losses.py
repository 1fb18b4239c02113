"""Losses and scores against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnml.core import ShapeError
from fnml.train import accuracy, cross_entropy, linear_next_token, mse, next_token


def reference(logits, labels, weights, smoothing=0.0):
    """Return total, weight and the gradient of total / weight, from the definition."""
    z = np.asarray(logits, float)
    peak = z.max(-1, keepdims=True)
    exp = np.exp(z - peak)
    log_p = z - peak - np.log(exp.sum(-1, keepdims=True))
    target = (1 - smoothing) * np.eye(z.shape[-1])[labels] + smoothing / z.shape[-1]
    terms = np.where(target == 0, 0.0, target * np.where(target == 0, 0.0, log_p))
    w = np.asarray(weights, float)
    softmax = exp / exp.sum(-1, keepdims=True)
    return (-terms.sum(-1) * w).sum(), w.sum(), (softmax - target) * w[..., None] / w.sum()


def draw(seed, *shape, classes=7, scale=3.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(*shape, classes)).astype(np.float32) * np.float32(scale)
    labels = rng.integers(0, classes, shape).astype(np.int32)
    weights = np.array(rng.integers(0, 3, shape) * rng.uniform(0.5, 1.5, shape), np.float32)
    weights.flat[0] = 1.0
    return logits, labels, weights


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 99),
    shape=st.sampled_from([(4,), (2, 3), ()]),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    scale=st.sampled_from([1.0, 100.0]),
)
def test_cross_entropy_and_its_gradient_follow_the_formula(seed, shape, smoothing, scale):
    logits, labels, weights = draw(seed, *shape, scale=scale)
    total, weight, gradient = reference(logits, labels, weights, smoothing)

    def mean(logits):
        found = cross_entropy(logits, labels, weights=weights, label_smoothing=smoothing)
        return found.value, found

    (value, found), grads = jax.value_and_grad(mean, has_aux=True)(jnp.asarray(logits))
    # An element is a difference of numbers of this size, each rounded to float32.
    size = max(np.abs(logits).max(), 1.0)
    np.testing.assert_allclose(found.total, total, rtol=1e-6, atol=1e-6 * size)
    np.testing.assert_allclose(found.weight, weight, rtol=1e-6)
    np.testing.assert_allclose(value, total / weight, rtol=1e-6, atol=1e-6 * size)
    np.testing.assert_allclose(grads, gradient, atol=2e-7 * size)


def test_without_weights_every_label_counts_once():
    logits, labels, _ = draw(0, 5)
    total, weight, _ = reference(logits, labels, np.ones(5))
    found = cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(found.total, total, rtol=1e-6)
    assert float(found.weight) == weight == 5


def test_bfloat16_logits_are_computed_in_float32():
    logits, labels, weights = draw(1, 64)
    half = jnp.asarray(logits, jnp.bfloat16)
    total, _, _ = reference(np.asarray(half, float), labels, weights)
    found = cross_entropy(half, jnp.asarray(labels), weights=jnp.asarray(weights))
    assert found.total.dtype == jnp.float32
    np.testing.assert_allclose(found.total, total, rtol=1e-6)


def test_extreme_and_excluded_logits_stay_finite():
    logits = jnp.array([[1e4, -1e4, 0.0], [-jnp.inf, 2.0, 1.0], [3e38, 0.0, -3e38]])
    labels = jnp.array([1, 2, 0])
    total, _, gradient = reference(np.asarray(logits), labels, np.ones(3))
    found, grads = jax.value_and_grad(lambda z: cross_entropy(z, labels).value)(logits)
    np.testing.assert_allclose(found, total / 3, rtol=1e-6)
    np.testing.assert_allclose(grads, gradient, atol=1e-6)


def test_a_nan_where_nothing_counts_does_not_show_in_value_or_gradient():
    logits = jnp.array([[jnp.nan, 0.0], [1.0, 0.0]])
    labels, weights = jnp.array([0, 0]), jnp.array([0.0, 1.0])
    found, grads = jax.value_and_grad(lambda z: cross_entropy(z, labels, weights=weights).value)(
        logits
    )
    np.testing.assert_allclose(found, np.log1p(np.exp(-1.0)), rtol=1e-6)
    assert np.isfinite(grads[1]).all()
    assert float(cross_entropy(logits, labels, weights=jnp.zeros(2)).value) == 0.0


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.int16, jnp.uint32])
def test_narrow_labels_do_not_wrap_around_the_classes(dtype):
    logits, _, _ = draw(2, 6, classes=300)
    labels = np.array([0, 1, 2, 43, 44, 100])
    logits[[0, 1], [256, 257]] = 50.0
    total, _, _ = reference(logits, labels, np.ones(6))
    found = cross_entropy(jnp.asarray(logits), jnp.asarray(labels, dtype))
    np.testing.assert_allclose(found.total, total, rtol=1e-6)
    right = accuracy(jnp.asarray(logits), jnp.asarray(labels, dtype))
    assert float(right.total) == (logits.argmax(-1) == labels).sum()


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 99), whole=st.booleans(), smoothing=st.sampled_from([0.0, 0.2]))
def test_next_token_averages_over_the_mask(seed, whole, smoothing):
    logits, targets, weights = draw(seed, 4, 5)
    mask = (weights > 0).astype(np.int32)
    mask = mask[:, 0] if whole else mask
    per_token = np.repeat(mask[:, None], 5, 1) if whole else mask
    total, weight, _ = reference(logits, targets, per_token, smoothing)
    found = next_token(
        jnp.asarray(logits), jnp.asarray(targets), mask=mask, label_smoothing=smoothing
    )
    np.testing.assert_allclose(found.total, total, rtol=1e-5)
    assert float(found.weight) == weight
    parts = [
        next_token(
            jnp.asarray(logits[s]), jnp.asarray(targets[s]), mask=mask[s], label_smoothing=smoothing
        )
        for s in (slice(0, 1), slice(1, 4))
    ]
    np.testing.assert_allclose((parts[0] + parts[1]).value, found.value, rtol=1e-5)


@pytest.mark.parametrize("whole", [True, False])
def test_linear_next_token_equals_next_token_of_the_logits(whole):
    rng = np.random.default_rng(0)
    features, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 5, 3), (3, 7)))
    targets = jnp.asarray(rng.integers(0, 7, (4, 5)), jnp.int32)
    mask = jnp.asarray(rng.integers(0, 2, (4,) if whole else (4, 5)))

    def fused(features, kernel, part):
        return linear_next_token(
            features, kernel, targets[part], mask=mask[part], label_smoothing=0.1
        )

    def plain(features, kernel, part):
        logits = features @ kernel
        return next_token(logits, targets[part], mask=mask[part], label_smoothing=0.1)

    def mean_and_grads(loss):
        def value(features, kernel):
            return loss(features, kernel, slice(None)).value

        return jax.value_and_grad(value, (0, 1))(features, kernel)

    for got, want in zip(*map(jax.tree.leaves, map(mean_and_grads, (fused, plain))), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
    parts = [fused(features[s], kernel, s) for s in (slice(0, 1), slice(1, 4))]
    whole_mean = fused(features, kernel, slice(None))
    assert float(whole_mean.weight) == float(sum(part.weight for part in parts))
    np.testing.assert_allclose((parts[0] + parts[1]).value, whole_mean.value, rtol=1e-6)


def test_linear_next_token_names_what_does_not_fit():
    with pytest.raises(ShapeError, match=r"x float32 \(2, 3, 4\) and w float32 \(5, 8\).*labels"):
        linear_next_token(jnp.zeros((2, 3, 4)), jnp.zeros((5, 8)), jnp.zeros((2, 2), jnp.int32))


def test_accuracy_counts_with_weights_and_the_first_of_equal_logits_wins():
    logits = jnp.array([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [0.0, 0.0, 3.0]])
    labels = jnp.array([0, 2, 2])
    assert float(accuracy(logits, labels).total) == 2.0
    found = accuracy(logits, labels, weights=jnp.array([2.0, 1.0, 0.0]))
    assert (float(found.total), float(found.weight)) == (2.0, 3.0)


def test_mse_follows_the_formula():
    rng = np.random.default_rng(0)
    a, b, w = rng.normal(size=(3, 4, 2)).astype(np.float32)
    found = mse(jnp.asarray(a), jnp.asarray(b), weights=jnp.asarray(np.abs(w)))
    np.testing.assert_allclose(
        found.value, ((a - b) ** 2.0 * np.abs(w)).sum() / np.abs(w).sum(), rtol=1e-6
    )
    half = mse(jnp.asarray(a, jnp.bfloat16), jnp.asarray(a, jnp.bfloat16) + jnp.bfloat16(1))
    assert half.total.dtype == jnp.float32


@pytest.mark.parametrize("loss", [cross_entropy, accuracy])
def test_every_wrong_shape_and_dtype_is_listed(loss):
    with pytest.raises(ShapeError) as error:
        loss(jnp.zeros((4, 3)), jnp.zeros((5,)), weights=jnp.zeros((4, 1)))
    for part in ("logits (4, 3)", "labels (5,), expected (4,)", "float32", "weights (4, 1)"):
        assert part in str(error.value)


def test_nothing_is_broadcast_silently():
    with pytest.raises(ShapeError, match=r"predictions \(4,\) and targets \(4, 1\)"):
        mse(jnp.zeros(4), jnp.zeros((4, 1)))
    with pytest.raises(ShapeError, match=r"labels \(2,\), expected \(2, 3\); weights \(2,\)"):
        next_token(jnp.zeros((2, 3, 5)), jnp.zeros(2, jnp.int32), mask=jnp.zeros(2))
    with pytest.raises(ShapeError, match=r"weights \(3, 3\), expected \(2, 3\)"):
        next_token(jnp.zeros((2, 3, 5)), jnp.zeros((2, 3), jnp.int32), mask=jnp.zeros(3))
