import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from fnml.core import ShapeError, init
from fnml.models import EncoderConfig, encoder

CONFIG = EncoderConfig(vocab=13, width=16, layers=3, heads=4, context=20, types=2)
MODEL = encoder(CONFIG)
# Larger than as drawn, so that attention is far from even, and with biases that are not zero.
PARAMS = jax.tree.map(
    lambda x: x + 0.2 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape),
    init(MODEL.spec, jax.random.key(0)),
)
TOKENS = jax.random.randint(jax.random.key(1), (3, 17), 0, 13)
TYPES = (jnp.arange(17) > 7).astype(jnp.int32)[None] * jnp.ones((3, 1), jnp.int32)
LENGTHS = jnp.array([17, 9, 1])
THERE = np.arange(17) < np.asarray(LENGTHS)[:, None]


def _textbook(params, tokens, types, there):
    """BERT in float64 NumPy, sequence by sequence and head by head, without padding."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.eps) * p["scale"] + p["bias"]

    def one(tokens, types):
        e = params["embed"]
        x = norm(e["token"][tokens] + e["type"][types] + e["position"][: len(tokens)], e["norm"])
        for i in range(CONFIG.layers):
            layer = jax.tree.map(operator.itemgetter(i), params["layers"])
            a, branch = layer["attention"], layer["attention"]["out"]["bias"]
            for h in range(CONFIG.heads):
                parts = (a[name] for name in ("query", "key", "value"))
                q, k, v = (x @ p["kernel"][:, h] + p["bias"][h] for p in parts)
                share = np.exp(q @ k.T / np.sqrt(q.shape[1]))
                share /= share.sum(-1, keepdims=True)
                branch = branch + share @ v @ a["out"]["kernel"][h]
            x = norm(x + branch, layer["attention_norm"])
            up = x @ layer["mlp"]["up"]["kernel"] + layer["mlp"]["up"]["bias"]
            up = up / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
            down = up @ layer["mlp"]["down"]["kernel"] + layer["mlp"]["down"]["bias"]
            x = norm(x + down, layer["mlp_norm"])
        return x

    return [
        one(*(np.asarray(x)[r] for x in rows))
        for *rows, r in zip(tokens, types, there, strict=True)
    ]


@pytest.mark.parametrize("padding", ["lengths", "mask"])
def test_hidden_states_equal_the_textbook_form(padding):
    options = {"lengths": LENGTHS} if padding == "lengths" else {"mask": jnp.asarray(THERE)}
    got = np.asarray(jax.jit(MODEL.apply)(PARAMS, TOKENS, TYPES, **options))
    want = _textbook(PARAMS, TOKENS, TYPES, THERE)
    for row, there, expected in zip(got, THERE, want, strict=True):
        # Three layers of float32 sums over at most 64 terms.
        assert np.linalg.norm(row[there] - expected) < 1e-5 * np.linalg.norm(expected)


def test_gradients_equal_finite_differences_in_float64():
    probe = jnp.cos(jnp.arange(TOKENS.size * CONFIG.width, dtype=jnp.float32))
    probe = jnp.where(THERE[..., None], probe.reshape(*TOKENS.shape, CONFIG.width), 0.0)

    def loss(params):
        return jnp.sum(MODEL.apply(params, TOKENS, TYPES, lengths=LENGTHS) * probe)

    def exact(params):
        hidden, weights = _textbook(params, TOKENS, TYPES, THERE), np.asarray(probe, np.float64)
        rows = zip(hidden, weights, THERE, strict=True)
        return sum((x * p[there]).sum() for x, p, there in rows)

    grads = jax.jit(jax.grad(loss))(PARAMS)
    way = jax.tree.map(lambda x: np.sin(np.arange(x.size)).reshape(x.shape), PARAMS)
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, w: (np.asarray(g) * w).sum(), grads, way)))
    base = jax.tree.map(lambda x: np.asarray(x, np.float64), PARAMS)
    ahead, behind = (
        exact(jax.tree.map(lambda p, w, h=h: p + h * w, base, way)) for h in (1e-6, -1e-6)
    )
    # The difference itself is good to about 1e-9; the float32 gradient to a few of its roundings.
    assert abs(slope - (ahead - behind) / 2e-6) < 2e-4 * abs(slope)


def test_padding_changes_no_bit_elsewhere():
    other = jnp.where(THERE, TOKENS, (TOKENS + 5) % CONFIG.vocab)
    run = jax.jit(lambda tokens: MODEL.apply(PARAMS, tokens, TYPES, lengths=LENGTHS))
    got, want = np.asarray(run(other)), np.asarray(run(TOKENS))
    np.testing.assert_array_equal(got[THERE], want[THERE])
    assert (got[~THERE] != want[~THERE]).any()


def test_types_default_to_the_first_and_are_read():
    run = jax.jit(MODEL.apply)
    plain = run(PARAMS, TOKENS)
    np.testing.assert_array_equal(plain, run(PARAMS, TOKENS, jnp.zeros_like(TYPES)))
    assert not np.allclose(plain, run(PARAMS, TOKENS, TYPES))


def test_bfloat16_activations_from_float32_parameters():
    model = encoder(dataclasses.replace(CONFIG, dtype="bfloat16"))
    got, want = (jax.jit(m.apply)(PARAMS, TOKENS, TYPES) for m in (model, MODEL))
    np.testing.assert_array_equal(got, got.astype(jnp.bfloat16).astype(jnp.float32))
    # bfloat16 keeps 8 bits.
    assert 0 < np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)


def _apart(params):
    """Cut the stacked layers apart."""
    layers = (jax.tree.map(operator.itemgetter(i), params["layers"]) for i in range(CONFIG.layers))
    return params | {"layers": list(layers)}


def test_the_loop_the_unrolled_loop_and_layers_apart_compute_the_same():
    def run(params, **form):
        model = encoder(dataclasses.replace(CONFIG, dropout=0.2, **form))
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda p: p.shape, model.spec)

        def loss(params):
            out = model.apply(params, TOKENS, TYPES, lengths=LENGTHS, key=jax.random.key(2))
            return jnp.sum(out * jnp.cos(out)), out

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    def close(got, want):
        # XLA fuses across layers where it sees them, so roundings differ, by a few per number.
        for one, other in zip(got, want, strict=True):
            one, other = ravel_pytree(one)[0], ravel_pytree(other)[0]
            assert jnp.linalg.norm(one - other) <= 1e-5 * jnp.linalg.norm(other)

    rolled = run(PARAMS, unroll=1)
    close(run(PARAMS, unroll=8), rolled)
    close(run(_apart(PARAMS), stacked=False), (_apart(rolled[0]), rolled[1]))


def test_layers_apart_are_drawn_each_for_itself():
    spec = encoder(dataclasses.replace(CONFIG, stacked=False)).spec
    first, second, _ = init(spec, jax.random.key(0))["layers"]
    assert spec["layers"][0]["mlp"]["up"]["kernel"].axes == ("embed", "mlp")
    assert not np.allclose(first["mlp"]["up"]["kernel"], second["mlp"]["up"]["kernel"])


def test_inputs_that_do_not_fit_are_refused_together():
    with pytest.raises(ShapeError) as error:
        MODEL.apply(PARAMS, jnp.ones((2, 21), jnp.int32), TYPES, mask=jnp.ones((2, 4), bool))
    assert all(part in str(error.value) for part in ("context=20", "types (3, 17)", "mask (2, 4)"))
    plain = encoder(EncoderConfig(vocab=13))
    with pytest.raises(ShapeError, match="types=0"):
        plain.apply(PARAMS, TOKENS, TYPES)
