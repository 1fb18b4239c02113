import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fnml.core import init
from fnml.models import GPTConfig, gpt

CONFIG = GPTConfig(vocab=13, width=16, layers=3, heads=4, kv_heads=2, context=70)
PARAMS = init(gpt(CONFIG).spec, jax.random.key(0))
TOKENS = jax.random.randint(jax.random.key(1), (2, 70), 0, 13)


def _textbook(config, params, tokens):
    """The same GPT in float64 NumPy, head by head."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    tokens = np.asarray(tokens)
    T, width, half = tokens.shape[1], config.head_width, config.head_width // 2
    angles = np.arange(T)[:, None] * config.rope_base ** (-np.arange(half) / half)
    turn = np.exp(1j * angles)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    def rope(x):
        z = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([z.real, z.imag], -1)

    x = params["embed"]["table"][tokens]
    for i in range(config.layers):
        layer = jax.tree.map(operator.itemgetter(i), params["layers"])
        y, weights = norm(x, layer["attention_norm"]["scale"]), layer["attention"]
        branch = np.zeros_like(x)
        for h in range(config.heads):
            group = h // (config.heads // config.groups)
            q, k = rope(y @ weights["query"][:, h]), rope(y @ weights["key"][:, group])
            scores = q @ k.transpose(0, 2, 1) / np.sqrt(width)
            scores[:, np.triu(np.ones((T, T), bool), 1)] = -np.inf
            share = np.exp(scores - scores.max(-1, keepdims=True))
            share /= share.sum(-1, keepdims=True)
            branch += share @ (y @ weights["value"][:, group]) @ weights["out"][h]
        x = x + branch
        y, mlp = norm(x, layer["mlp_norm"]["scale"]), layer["mlp"]
        gate = y @ mlp["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ mlp["up"])) @ mlp["down"]
    head = params["embed"]["table"].T if config.tied else params["head"]["kernel"]
    return norm(x, params["norm"]["scale"]) @ head


@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_the_textbook_form(tied):
    config = dataclasses.replace(CONFIG, tied=tied)
    params = {name: part for name, part in PARAMS.items() if not (tied and name == "head")}
    got = jax.jit(gpt(config).apply)(params, TOKENS)
    want = _textbook(config, params, TOKENS)
    # Three layers of float32 sums over at most 70 terms.
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)
    assert ("head" in gpt(config).spec) != tied


def test_the_unrolled_loop_has_the_bits_of_the_rolled_one():
    def run(unroll):
        model = gpt(dataclasses.replace(CONFIG, unroll=unroll))

        def loss(params):
            return jnp.sin(model.apply(params, TOKENS)).mean()

        return jax.jit(jax.value_and_grad(loss))(PARAMS)

    rolled, partly, unrolled = run(1), run(2), run(8)
    jax.tree.map(np.testing.assert_array_equal, partly, rolled)
    jax.tree.map(np.testing.assert_array_equal, unrolled, rolled)


@pytest.mark.parametrize("t", [1, 63, 64, 69])
def test_changing_a_token_changes_no_bit_before_it(t):
    apply = jax.jit(gpt(CONFIG).apply)
    changed = TOKENS.at[:, t].set((TOKENS[:, t] + 1) % 13)
    got, want = apply(PARAMS, changed), apply(PARAMS, TOKENS)
    np.testing.assert_array_equal(got[:, :t], want[:, :t])
    assert (got[:, t:] != want[:, t:]).any(-1).all()


def test_an_untrained_model_knows_nothing():
    config = GPTConfig(vocab=64, width=64, layers=4, context=32)
    tokens = jax.random.randint(jax.random.key(2), (4, 32), 0, 64)
    logits = gpt(config).apply(init(gpt(config).spec, jax.random.key(0)), tokens)
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1).mean()
    # Logits have a standard deviation of 0.02 * sqrt(64) = 0.16: log V plus 0.013.
    assert abs(float(loss) - np.log(64)) < 0.05


def test_branches_are_scaled_down_with_depth():
    for layers in (2, 8):
        config = GPTConfig(vocab=8, width=64, layers=layers)
        weights = init(gpt(config).spec, jax.random.key(0))["layers"]
        want = (2 * layers * 64) ** -0.5
        assert float(weights["attention"]["out"].std()) == pytest.approx(want, rel=0.05)
        down = (2 * layers * config.hidden) ** -0.5
        assert float(weights["mlp"]["down"].std()) == pytest.approx(down, rel=0.05)
        assert float(weights["attention"]["query"].std()) == pytest.approx(1 / 8, rel=0.05)


def test_checkpoint_policies_find_the_named_branches():
    def loss(params):
        return gpt(CONFIG).apply(params, TOKENS).sum()

    text = str(jax.make_jaxpr(loss)(PARAMS))
    assert "attention_out" in text
    assert "mlp_out" in text


def test_the_configured_dtype_rules_the_activations():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    text = str(jax.make_jaxpr(gpt(config).apply)(PARAMS, TOKENS))
    assert "bf16[2,70,16]" in text
    logits = gpt(config).apply(PARAMS, TOKENS)
    want = gpt(CONFIG).apply(PARAMS, TOKENS)
    assert logits.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(logits - want) / np.linalg.norm(want) < 0.05


def test_a_token_outside_the_vocabulary_shows_as_nan_in_its_sequence():
    logits = gpt(CONFIG).apply(PARAMS, TOKENS.at[0, 40].set(13))
    assert np.isnan(logits[0, 40:]).all()
    assert np.isfinite(logits[1]).all()


def test_a_scan_over_micro_batches_has_the_bits_of_a_loop():
    apply = gpt(CONFIG).apply
    batches = TOKENS[:, None]
    scanned = jax.jit(lambda xs: lax.scan(lambda _, x: (None, apply(PARAMS, x)), None, xs)[1])
    looped = jax.jit(lambda x: apply(PARAMS, x))
    np.testing.assert_array_equal(scanned(batches), np.stack([looped(x) for x in batches]))
