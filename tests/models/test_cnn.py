import jax
import jax.numpy as jnp
import numpy as np

from fnml.core import Mean, init
from fnml.models import CNNConfig, cnn

MODEL = cnn(CNNConfig(classes=3, widths=(4, 6), blocks=2))
PARAMS, STATE = init(MODEL.spec, jax.random.key(0)), init(MODEL.state, jax.random.key(0))
X = jax.random.normal(jax.random.key(1), (6, 8, 8, 1)) + 0.5
TRAIN = jax.jit(lambda x: MODEL.apply(PARAMS, x, state=STATE, train=True))
EVALUATE = jax.jit(lambda x, state: MODEL.apply(PARAMS, x, state=state, train=False)[0])


def _is_mean(leaf):
    return isinstance(leaf, Mean)


def test_training_does_not_read_the_state():
    other = jax.tree.map(lambda leaf: leaf + 5.0, STATE)
    logits, _ = jax.jit(lambda x: MODEL.apply(PARAMS, x, state=other, train=True))(X)
    np.testing.assert_array_equal(logits, TRAIN(X)[0])


def test_evaluation_with_a_batch_s_statistics_gives_its_training_logits():
    logits, stats = TRAIN(X)
    state = jax.tree.map(lambda mean: mean.value, stats, is_leaf=_is_mean)
    # The variance is formed as E[x**2] - E[x]**2 here and about the mean there.
    np.testing.assert_allclose(EVALUATE(X, state), logits, rtol=1e-3, atol=1e-4)
    assert np.abs(EVALUATE(X, STATE) - logits).max() > 1e-2


def test_merged_stem_statistics_are_those_of_the_whole_batch():
    # Behind the first norm each shard is normalised by itself, so only the stem's input is equal.
    whole, *parts = (TRAIN(x)[1]["stem"]["norm"] for x in (X, X[:2], X[2:]))
    merged = jax.tree.map(lambda a, b: a + b, *parts, is_leaf=_is_mean)
    for name in ("mean", "square"):
        np.testing.assert_allclose(merged[name].value, whole[name].value, rtol=1e-5)
        np.testing.assert_array_equal(merged[name].weight, np.full(4, 6 * 64.0))


def test_evaluation_treats_examples_one_by_one():
    alone = jnp.concatenate([EVALUATE(x[None], STATE) for x in X])
    np.testing.assert_allclose(alone, EVALUATE(X, STATE), rtol=1e-4, atol=1e-5)
