"""Each example's gradient is what a batch of that example alone gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnml.core import LayoutError, Mean, Metrics, shard_key
from fnml.transforms import accumulate, per_example

RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32), "b": jnp.zeros(2, jnp.float32)}
BATCH = {
    "x": jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32),
    "weights": jnp.asarray([1.0, 2.0, 0.0, 1.0, 0.5, 3.0], jnp.float32),
}
KEY = jax.random.key(3)


def loss_fn(params, batch, key, *, noise=0.0):
    out = jnp.tanh(batch["x"] @ params["w"] + params["b"][None])
    out = out + noise * jax.random.normal(key, out.shape)
    loss = Mean.of(jnp.sum(out**2, axis=1), batch["weights"])
    return loss.value, Metrics(loss.weight, {"out": Mean.of(out)})


GRAD = jax.value_and_grad(loss_fn, has_aux=True)


def relative(a, b):
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]).astype(float) for t in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 6])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_each_example_equals_a_batch_of_one(chunk: int | None, noise: float) -> None:
    run = jax.jit(lambda p, b, k: per_example(GRAD, chunk)(p, b, k, noise=noise))
    (losses, metrics), grads = run(PARAMS, BATCH, KEY)
    assert losses.shape == metrics.weight.shape == (6,)
    for i in range(6):
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], BATCH)
        (loss, _), grad = GRAD(PARAMS, one, shard_key(KEY, i), noise=noise)
        if BATCH["weights"][i] == 0:
            assert all(not leaf[i].any() for leaf in jax.tree.leaves(grads))
            continue
        # A few float32 roundings of products batched in another way.
        assert relative(jax.tree.map(lambda g, i=i: g[i], grads), grad) < 2e-6
        assert losses[i] == pytest.approx(float(loss), rel=2e-6)


def test_the_weighted_mean_is_the_batch_gradient() -> None:
    (_, metrics), grads = per_example(GRAD, 2)(PARAMS, BATCH, KEY)
    w = np.asarray(metrics.weight, float)
    mean = jax.tree.map(lambda g: np.tensordot(w, np.asarray(g, float), 1) / w.sum(), grads)
    assert relative(mean, GRAD(PARAMS, BATCH, KEY)[1]) < 1e-6


def test_refusals_say_what_works() -> None:
    with pytest.raises(LayoutError, match="at least 1 example, got 0"):
        per_example(GRAD, 0)
    with pytest.raises(LayoutError, match="6 examples into chunks of 4"):
        per_example(GRAD, 4)(PARAMS, BATCH, KEY)
    with pytest.raises(LayoutError, match=r"per_example\(grad_fn, chunk"):
        per_example(accumulate(GRAD, 2))
