"""prune: exactly as many zeros as asked for, which stay zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapted_models import KEY, case, distance, same_bits

from fnml.core import ConfigError, State, init, leaf_names
from fnml.train import train_step
from fnml.transforms import (
    adapt,
    lora,
    merge,
    prune,
    train_only,
    trainable_value_and_grad,
)


@pytest.mark.parametrize("name", ["cnn", "gpt", "linen", "nnx"])
def test_masked_weights_are_zero_and_stay_so_in_training(name):
    c = case(name)
    model = prune(c.model, 0.6)
    params = adapt(model, c.params)
    merged = merge(model, params)
    same_bits(params["base"], merged)
    out = c.call(model, params, KEY)
    assert distance(out, c.call(c.model, merged, KEY)) < 5e-6
    optimizer = train_only(optax.adamw(1e-2, weight_decay=0.1), model)
    step = jax.jit(train_step(trainable_value_and_grad(c.loss_fn(model), model), optimizer))
    state = State.create(params, optimizer, KEY, c.state)
    for _ in range(3):
        state, _ = step(state, c.batch)
    same_bits(state.params["mask"], params["mask"])
    moved = merge(model, state.params)
    same_bits(moved, state.params["base"])
    before, after = (
        dict(zip(leaf_names(t), jax.tree.leaves(t), strict=True)) for t in (merged, moved)
    )
    dropped = 0
    for path, mask in params["mask"].items():
        assert np.all(np.asarray(after[path])[~np.asarray(mask)] == 0)
        assert jnp.any(after[path] != before[path])
        dropped += int(jnp.sum(~mask))
    assert dropped > 0.5 * sum(mask.size for mask in params["mask"].values())


def expected_mask(w, sparsity):
    """Keep the largest of a vector, in NumPy, the first of equals."""
    order = sorted(range(w.size), key=lambda i: (-abs(float(w[i])), i))
    mask = np.zeros(w.size, bool)
    mask[order[: w.size - round(w.size * sparsity)]] = True
    return mask


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75, 0.99])
def test_the_mask_is_the_textbook_one(sparsity):
    c = case("gpt")
    each = adapt(prune(c.model, sparsity), c.params)["mask"]
    query = np.asarray(c.params["layers"]["attention"]["query"])
    for layer in range(2):
        found = np.asarray(each["layers/attention/query"][layer]).ravel()
        np.testing.assert_array_equal(found, expected_mask(query[layer].ravel(), sparsity))
    targets = ("layers/mlp/up", "layers/mlp/down")
    both = adapt(prune(c.model, sparsity, scope="global", targets=targets), c.params)
    mlp = c.params["layers"]["mlp"]
    flat = np.concatenate([np.ravel(mlp["down"]), np.ravel(mlp["up"])])
    found = np.concatenate([np.ravel(both["mask"][f"layers/mlp/{k}"]) for k in ("down", "up")])
    np.testing.assert_array_equal(found, expected_mask(flat, sparsity))
    ties = prune(c.model, sparsity, targets="head/kernel")
    same = jax.tree.map(jnp.ones_like, c.params)
    kept = int(jnp.sum(adapt(ties, same)["mask"]["head/kernel"]))
    assert kept == 16 * 11 - round(16 * 11 * sparsity)


def test_a_pattern_holds_in_every_run_of_inputs():
    c = case("gpt")
    model = prune(c.model, pattern=(2, 4), targets="layers/**/*t*")
    params = adapt(model, c.params)
    out, w = params["mask"]["layers/attention/out"], c.params["layers"]["attention"]["out"]
    runs = np.asarray(out).reshape(2, 4, 4, 16)  # layers, runs, four inputs each, outputs
    values = np.abs(np.asarray(w)).reshape(2, 4, 4, 16)
    assert np.all(runs.sum(2) == 2)
    least_kept = np.where(runs, values, np.inf).min(2)
    most_dropped = np.where(runs, -np.inf, values).max(2)
    assert np.all(least_kept >= most_dropped)


def test_it_starts_with_everything_and_goes_under_factors():
    c = case("mlp")
    model = prune(c.model, 0.5)
    params = init(model.spec, KEY)
    same_bits(c.call(model, params), c.call(c.model, params["base"]))
    tuned = lora(model, rank=2)
    params = adapt(tuned, c.params, KEY)
    same_bits(c.call(tuned, params), c.call(model, adapt(model, c.params)))
    # Around factors the sum is masked: merged weights are as sparse as the mask.
    outside = prune(lora(c.model, rank=2), 0.5)
    params = adapt(outside, c.params, KEY)
    params["base"]["lora"] = jax.tree.map(lambda x: x + 1, params["base"]["lora"])
    assert float(jnp.mean(merge(outside, params)["head"]["kernel"] == 0)) == 0.5


def test_mistakes_are_named():
    m = case("mlp").model
    with pytest.raises(ConfigError, match=r"sparsity=1.0.*scope='all'"):
        prune(m, 1.0, scope="all")
    with pytest.raises(ConfigError, match="1 <= n <= m"):
        prune(m, pattern=(3, 2))
    with pytest.raises(ConfigError, match="5 does not divide the 16 inputs of head/kernel"):
        prune(m, pattern=(2, 5))
