import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnml.core import ConfigError, ShapeError, init
from fnml.models import GPTConfig, generate, gpt, gpt_cache, gpt_decode

CONFIG = GPTConfig(vocab=13, width=16, layers=2, heads=4, kv_heads=2, context=12)
PARAMS = init(gpt(CONFIG).spec, jax.random.key(0))
# Far from the start, so that the likeliest token is likely.
PARAMS = jax.tree.map(lambda p: 3 * p, PARAMS)
TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, 13)
DECODE = jax.jit(gpt_decode(CONFIG))
APPLY = jax.jit(gpt(CONFIG).apply)


def _decode(tokens, cuts, length=12):
    cache, outs, position = gpt_cache(CONFIG, 2, length), [], 0
    for t in cuts:
        logits, cache = DECODE(PARAMS, cache, tokens[:, position : position + t], position)
        outs.append(logits)
        position += t
    return jnp.concatenate(outs, 1)


@pytest.mark.parametrize("cuts", [[1] * 12, [12], [5, 1, 1, 4, 1]])
def test_decoding_in_any_cut_equals_apply(cuts):
    got, want = _decode(TOKENS, cuts), APPLY(PARAMS, TOKENS)
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)


def test_a_longer_cache_changes_only_rounding():
    got, want = _decode(TOKENS, [4] + [1] * 8, length=20), _decode(TOKENS, [4] + [1] * 8)
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)


def test_a_full_cache_forgets_the_oldest_token():
    # With one layer, what a token reads is exactly the last four tokens.
    config = GPTConfig(vocab=13, width=16, layers=1, heads=2, context=12)
    params = jax.tree.map(lambda p: 3 * p, init(gpt(config).spec, jax.random.key(0)))
    decode, cache = jax.jit(gpt_decode(config)), gpt_cache(config, 2, 4)
    for t in range(12):
        got, cache = decode(params, cache, TOKENS[:, t : t + 1], t)
    want = gpt(config).apply(params, TOKENS[:, 8:])[:, -1:]
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)
    longer = gpt(config).apply(params, TOKENS[:, 7:])[:, -1:]
    assert np.linalg.norm(got - longer) > 1e-3 * np.linalg.norm(want)


def test_several_tokens_beyond_the_cache_give_nan():
    cache = gpt_cache(CONFIG, 2, 4)
    _, cache = DECODE(PARAMS, cache, TOKENS[:, :3], 0)
    logits, _ = DECODE(PARAMS, cache, TOKENS[:, 3:5], 3)
    assert np.isnan(logits).all()


def test_the_likeliest_tokens_are_those_of_apply():
    prompt = TOKENS[:, :4]
    got = generate(CONFIG, PARAMS, prompt, 8, jax.random.key(0), temperature=0.0)
    want = prompt
    for _ in range(8):
        padded = jnp.pad(want, ((0, 0), (0, 12 - want.shape[1])))
        likeliest = APPLY(PARAMS, padded)[:, want.shape[1] - 1].argmax(-1)
        want = jnp.concatenate([want, likeliest[:, None].astype(want.dtype)], 1)
    np.testing.assert_array_equal(got, want)
    of_one = generate(CONFIG, PARAMS, prompt, 8, jax.random.key(5), top_k=1)
    np.testing.assert_array_equal(of_one, want)


def test_draws_follow_the_softmax_of_the_temperature():
    prompt = jnp.tile(TOKENS[:1, :4], (4000, 1))
    logits = np.asarray(APPLY(PARAMS, jnp.pad(TOKENS[:1, :4], ((0, 0), (0, 8))))[0, 3], np.float64)
    for top_k in (None, 3):
        out = generate(CONFIG, PARAMS, prompt, 1, jax.random.key(3), temperature=2.0, top_k=top_k)
        share = np.bincount(out[:, -1], minlength=13) / 4000
        kept = np.sort(logits)[-(top_k or 13)]
        want = np.where(logits >= kept, np.exp(logits / 2), 0)
        want = want / want.sum()
        # 4,000 draws: five standard deviations of a share are at most 0.04.
        np.testing.assert_allclose(share, want, atol=0.04)
        assert (share[want == 0] == 0).all()


def test_keys_decide_and_generation_goes_on_beyond_the_context():
    prompt = TOKENS[:, :4]
    one, same, other = (
        generate(CONFIG, PARAMS, prompt, 20, jax.random.key(seed), temperature=3.0)
        for seed in (0, 0, 1)
    )
    assert one.shape == (2, 24)
    assert one.dtype == prompt.dtype
    np.testing.assert_array_equal(one, same)
    np.testing.assert_array_equal(one[:, :4], prompt)
    assert (one != other).any()
    assert ((one >= 0) & (one < 13)).all()


def test_misuse_is_refused_with_the_numbers():
    with pytest.raises(ShapeError, match=r"cache of 2 sequences of 4 tokens: expected \[2, t\]"):
        gpt_decode(CONFIG)(PARAMS, gpt_cache(CONFIG, 2, 4), TOKENS, 0)
    with pytest.raises(ConfigError, match="length=0: expected 1 or more"):
        gpt_cache(CONFIG, 2, 0)
    with pytest.raises(ShapeError, match="P from 1 to context=12"):
        generate(CONFIG, PARAMS, TOKENS[:, :0], 1, jax.random.key(0))
    with pytest.raises(ConfigError) as error:
        generate(CONFIG, PARAMS, TOKENS, 0, jax.random.key(0), temperature=-1.0, top_k=14)
    assert all(f in str(error.value) for f in ("length=0", "temperature=-1.0", "top_k=14"))
