"""mixed_precision: the model cast by hand, with gradients in the parameters' own dtype."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnml.core import ConfigError, LayoutError, Mean, Metrics, ShapeError, init, matches
from fnml.models import CNNConfig, GPTConfig, cnn, gpt
from fnml.train import cross_entropy, next_token
from fnml.transforms import Policy, accumulate, mixed_precision

KEY = jax.random.key(1)
GPT = gpt(GPTConfig(vocab=11, width=16, layers=2, heads=2, context=6, dropout=0.2, unroll=1))
CNN = cnn(CNNConfig(classes=5, channels=2, widths=(4,)))
RNG = np.random.default_rng(0)
TEXT = {
    "tokens": RNG.integers(0, 11, (4, 7)).astype(np.int32),
    "mask": (np.arange(6) < RNG.integers(1, 7, (4, 1))).astype(np.float32),
}
IMAGES = {
    "x": RNG.normal(size=(4, 4, 4, 2)).astype(np.float32),
    "y": RNG.integers(0, 5, 4).astype(np.int32),
}


def text_loss(params, batch, key):
    tokens = batch["tokens"]
    logits = GPT.apply(params, tokens[:, :-1], key=key)
    loss = next_token(logits, tokens[:, 1:], mask=batch["mask"])
    return loss.value, Metrics(loss.weight, {"nll": loss})


def image_loss(params, batch, key, *, state, train):
    logits, stats = CNN.apply(params, batch["x"], state=state, train=train)
    loss = cross_entropy(logits, batch["y"])
    return loss.value, Metrics(loss.weight, {}, stats)


CASES = {
    "gpt": (GPT, text_loss, TEXT, {}, "**/scale"),
    "cnn": (
        CNN,
        functools.partial(image_loss, train=True),
        IMAGES,
        {"state": init(CNN.state, jax.random.key(0))},
        ("**/norm*/*", "head/bias"),
    ),
}


def narrow(tree, globs=(), dtype=jnp.bfloat16):
    """Cast a nested tree of floats by hand."""

    def cast(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        stays = matches(name, globs) or x.dtype != jnp.float32
        return jnp.asarray(x) if stays else jnp.asarray(x).astype(dtype)

    return jax.tree.map_with_path(cast, tree)


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("keeping", [False, True])
def test_it_is_the_model_cast_by_hand_bit_for_bit(name, keeping):
    model, loss_fn, batch, options, globs = CASES[name]
    keep = globs if keeping else ()
    params = init(model.spec, jax.random.key(0))
    mixed = mixed_precision(loss_fn, keep=keep)
    (loss, metrics), grads = jax.jit(jax.value_and_grad(mixed, has_aux=True))(
        params, batch, KEY, **options
    )

    def by_hand(params, batch, key, **options):
        return loss_fn(narrow(params, keep), narrow(batch), key, **options)

    same(
        ((loss, metrics), grads),
        jax.jit(jax.value_and_grad(by_hand, has_aux=True))(params, batch, KEY, **options),
    )
    # Cast outside and differentiated with respect to the narrow parameters, the gradients are
    # rounded to 8 bits; inside, XLA may widen a product that was float32 until it was rounded.
    (loss_r, metrics_r), grads_r = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
        narrow(params, keep), narrow(batch), KEY, **options
    )
    same((loss, metrics), (loss_r.astype(jnp.float32), metrics_r))
    for g, r in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_r), strict=True):
        assert g.dtype == jnp.float32
        assert np.linalg.norm(g - r.astype(jnp.float32)) <= 2**-8 * np.linalg.norm(g)
    kept = [g.dtype == jnp.float32 for g in jax.tree.leaves(grads_r)]
    assert any(kept) == keeping and not all(kept)


def test_it_differs_from_float32_by_no_more_than_bfloat16_should():
    params = init(GPT.spec, jax.random.key(0))
    wide = jax.jit(jax.grad(text_loss, has_aux=True))(params, TEXT, KEY)[0]
    mixed = jax.grad(mixed_precision(text_loss), has_aux=True)
    found = jax.jit(mixed)(params, TEXT, KEY)[0]
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (found, wide))
    error = np.linalg.norm(a - b) / np.linalg.norm(b)
    # 2**-9 is half an ulp of bfloat16; a few layers of roundings add up to some of them.
    assert 2**-11 < error < 2**-5


def test_a_policy_of_the_arguments_own_dtypes_changes_nothing():
    params = init(GPT.spec, jax.random.key(0))
    mixed = mixed_precision(text_loss, Policy("float32", "float32", "float32"))
    same(
        jax.jit(jax.value_and_grad(mixed, has_aux=True))(params, TEXT, KEY),
        jax.jit(jax.value_and_grad(text_loss, has_aux=True))(params, TEXT, KEY),
    )


def test_inputs_are_cast_unless_kept_and_integers_and_options_never():
    seen = {}

    def loss_fn(params, batch, key, **options):
        seen.update(batch=batch, options=options, params=params)
        return jnp.sum(params["w"]), Metrics(jnp.float32(1.0), {"n": Mean.of(batch["mask"])})

    batch = {"x": jnp.ones(2), "mask": jnp.full(2, 257.0), "id": jnp.ones(2, jnp.int32)}
    params = {"w": jnp.ones(2), "steps": jnp.ones(2, jnp.int32)}
    policy = Policy("float32", "float16", "bfloat16")
    mixed = mixed_precision(loss_fn, policy, keep_inputs="mask")
    loss, metrics = mixed(params, batch, KEY, state=jnp.ones(1), train=True)
    assert {name: str(x.dtype) for name, x in seen["batch"].items()} == {
        "x": "float16",
        "mask": "float32",
        "id": "int32",
    }
    assert [str(x.dtype) for x in jax.tree.leaves(seen["params"])] == ["int32", "float16"]
    assert seen["options"]["state"].dtype == jnp.float32 and seen["options"]["train"] is True
    assert loss.dtype == jnp.bfloat16 and metrics.weight.dtype == jnp.float32
    assert float(metrics.values["n"].total) == 514.0


def test_inside_a_layout_gradients_are_summed_in_float32():
    params = {"w": jnp.linspace(0.5, 1.5, 8)}
    batch = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), jnp.float32)

    def loss_fn(params, batch, key):
        error = Mean.of((batch * jnp.broadcast_to(params["w"], batch.shape)) ** 2)
        return error.value, Metrics(error.weight)

    g = jax.value_and_grad(mixed_precision(loss_fn), has_aux=True)
    _, grads = jax.jit(accumulate(g, 64))(params, batch, KEY)
    one = jax.jit(g)
    shards = [np.float64(one(params, batch[i : i + 1], KEY)[1]["w"]) for i in range(64)]
    expected = np.mean(shards, 0)
    error = np.linalg.norm(grads["w"] - expected) / np.linalg.norm(expected)
    assert grads["w"].dtype == jnp.float32 and error < 1e-6


def test_parameters_of_another_dtype_are_listed_unless_kept():
    params = {
        "a": jnp.ones(2, jnp.float16),
        "b": jnp.ones(2),
        "c": {"d": jnp.ones(1, jnp.bfloat16)},
    }

    def loss_fn(params, batch, key):
        return jnp.sum(params["b"]), Metrics(jnp.float32(1.0))

    with pytest.raises(ShapeError, match=r"in float32, got a: float16, c/d: bfloat16"):
        mixed_precision(loss_fn)(params, {}, KEY)
    loss, _ = mixed_precision(loss_fn, keep=("a", "c/*"))(params, {}, KEY)
    assert float(loss) == 2.0


def test_unknown_dtypes_and_globs_are_named():
    with pytest.raises(ConfigError, match="got params='int32', compute='bfloat61'"):
        mixed_precision(text_loss, Policy("int32", "bfloat61"))
    with pytest.raises(ConfigError, match=r"'norms/scale' matches none.*Did you mean 'norm/scale'"):
        mixed_precision(text_loss, keep="norms/scale")(init(GPT.spec, KEY), TEXT, KEY)


@pytest.mark.parametrize("count", [0, 2])
def test_gradient_functions_are_refused_with_the_order_that_works(count):
    grad_fn = jax.value_and_grad(text_loss, has_aux=True)
    order = r"accumulate\(jax.value_and_grad\(mixed_precision\(loss_fn, ...\), has_aux=True\), n\)"
    with pytest.raises(LayoutError, match=order):
        given = accumulate(grad_fn, count) if count else grad_fn
        mixed_precision(given)(init(GPT.spec, KEY), TEXT, KEY)
