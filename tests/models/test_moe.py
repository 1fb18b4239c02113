import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnml.core import ConfigError, Mean, ShapeError, init
from fnml.models import GPTConfig, gpt, gpt_cache, gpt_decode, moe, route

CONFIG = GPTConfig(
    vocab=13, width=16, layers=2, heads=2, context=20, experts=4, mlp_width=32, experts_per_token=2
)
MODEL = gpt(CONFIG)
PARAMS = jax.tree.map(lambda p: 3 * p, init(MODEL.spec, jax.random.key(0)))
APPLY = jax.jit(MODEL.apply)
BALANCED = jax.jit(functools.partial(MODEL.apply, balance=True))
TOKENS = jax.random.randint(jax.random.key(1), (2, 20), 0, 13)


def _layer(seed=0, E=4, D=6, M=5):
    random = np.random.default_rng(seed)
    shapes = {"router": (D, E), "gate": (E, D, M), "up": (E, D, M), "down": (E, M, D)}
    params = {name: jnp.asarray(random.normal(size=s), jnp.float32) for name, s in shapes.items()}
    return params, jnp.asarray(random.normal(size=(3, 7, D)), jnp.float32)


def _textbook(params, x, k):
    """Token by token in float64 NumPy: the output, the sizes and the balance."""
    params = {name: np.asarray(p, np.float64) for name, p in params.items()}
    x = np.asarray(x, np.float64)
    rows = x.reshape(-1, x.shape[-1])
    E = params["router"].shape[1]
    shares = np.exp(rows @ params["router"])
    shares /= shares.sum(-1, keepdims=True)
    out, sizes = np.zeros(rows.shape), np.zeros(E, int)
    for n, row in enumerate(rows):
        chosen = np.argsort(-shares[n])[:k]
        weights = shares[n, chosen] / (shares[n, chosen].sum() if k > 1 else 1)
        for e, weight in zip(chosen, weights, strict=True):
            sizes[e] += 1
            gate = row @ params["gate"][e]
            hidden = gate / (1 + np.exp(-gate)) * (row @ params["up"][e])
            out[n] += weight * hidden @ params["down"][e]
    share = sizes / sizes.sum()
    return out.reshape(x.shape), sizes, E * (share * shares.mean(0)).sum()


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_layer_equals_the_textbook_and_keeps_every_token(k):
    params, x = _layer()
    y, routes = moe(x, params, experts_per_token=k)
    want, sizes, balance = _textbook(params, x, k)
    assert np.linalg.norm(y - want) < 1e-5 * np.linalg.norm(want)
    np.testing.assert_array_equal(routes.sizes, sizes)
    assert int(routes.sizes.sum()) == 21 * k
    assert float(routes.balance) == pytest.approx(balance, rel=1e-5)


def test_gradients_equal_those_of_all_experts_on_all_tokens():
    params, x = _layer()

    def dense(x, params):
        routes = route(x.reshape(-1, 6), params["router"], 2)
        gate, up = (jnp.einsum("btd,edm->ebtm", x, params[name]) for name in ("gate", "up"))
        each = jnp.einsum("ebtm,emd->ebtd", jax.nn.silu(gate) * up, params["down"])
        hit = jax.nn.one_hot(routes.experts, 4) * routes.weights[..., None]  # [N, k, E]
        return jnp.einsum("ne,end->nd", hit.sum(1), each.reshape(4, -1, 6)).reshape(x.shape)

    along = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def slopes(layer):
        return jax.jit(jax.grad(lambda x, params: jnp.sum(layer(x, params) * along), (0, 1)))

    got, want = slopes(lambda x, p: moe(x, p)[0])(x, params), slopes(dense)(x, params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


def test_permuting_the_experts_changes_nothing():
    params, x = _layer()
    order = jnp.array([2, 0, 3, 1])
    turned = {name: p[order] for name, p in params.items()} | {"router": params["router"][:, order]}
    y, routes = moe(x, params)
    other, moved = moe(x, turned)
    assert np.linalg.norm(y - other) < 1e-6 * np.linalg.norm(y)
    np.testing.assert_array_equal(moved.sizes, routes.sizes[order])


def test_the_balance_is_1_when_even_and_E_when_one_expert_gets_all():
    x = jnp.eye(4)
    assert float(route(x, 50 * jnp.eye(4), 1).balance) == pytest.approx(1)
    assert float(route(x, 50 * jnp.ones((4, 1)) * jnp.eye(4)[:1], 1).balance) == pytest.approx(4)


def test_the_balance_pays_the_router_for_spreading_tokens():
    params, x = _layer()
    rows = jnp.abs(x.reshape(-1, 6))
    # Every token goes to expert 0.
    router = params["router"] * 0.1 + jnp.eye(4)[:1]
    balance = lambda router: route(rows, router, 1).balance
    assert float(balance(router - jax.grad(balance)(router))) < float(balance(router)) - 0.1


def test_one_expert_is_the_dense_model():
    one = dataclasses.replace(CONFIG, experts=1, experts_per_token=1)
    dense = dataclasses.replace(CONFIG, experts=None)
    params = init(gpt(one).spec, jax.random.key(0))
    plain = {**params, "layers": dict(params["layers"])}
    mlp = params["layers"]["mlp"]
    plain["layers"]["mlp"] = {name: mlp[name][:, 0] for name in ("gate", "up", "down")}
    got, want = jax.jit(gpt(one).apply)(params, TOKENS), jax.jit(gpt(dense).apply)(plain, TOKENS)
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)
    assert jax.tree.structure(gpt(dense).spec) == jax.tree.structure(plain)


def test_the_balance_of_a_gpt_is_a_mean_over_its_tokens():
    logits, balance = BALANCED(PARAMS, TOKENS)
    np.testing.assert_array_equal(logits, APPLY(PARAMS, TOKENS))
    assert isinstance(balance, Mean)
    assert float(balance.weight) == 40
    assert 1 <= float(balance.value) < 4
    single = jax.tree.map(operator.itemgetter(slice(0, 1)), PARAMS["layers"])
    one = gpt(dataclasses.replace(CONFIG, layers=1))
    first = jax.jit(functools.partial(one.apply, balance=True))(
        {**PARAMS, "layers": single}, TOKENS
    )[1]
    assert float(first.value) != float(balance.value)


def test_training_and_decoding_work_with_experts():
    def loss(params):
        logits, balance = MODEL.apply(params, TOKENS[:, :-1], balance=True)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[:, 1:, None], -1)
        return -picked.mean() + 0.01 * balance.value

    slope = jax.jit(jax.value_and_grad(loss))
    before, grads = slope(PARAMS)
    assert float(jnp.linalg.norm(grads["layers"]["mlp"]["router"])) > 0
    step = jax.tree.map(lambda p, g: p - 0.01 * g, PARAMS, grads)
    assert float(slope(step)[0]) < float(before)
    decode, cache = jax.jit(gpt_decode(CONFIG)), gpt_cache(CONFIG, 2, 20)
    outs = []
    for start, stop in ((0, 9), (9, 10), (10, 20)):
        logits, cache = decode(PARAMS, cache, TOKENS[:, start:stop], start)
        outs.append(logits)
    want = APPLY(PARAMS, TOKENS)
    got = jnp.concatenate(outs, 1)
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)


def test_misuse_is_refused():
    with pytest.raises(ConfigError, match="experts_per_token=2 is more than experts=1"):
        GPTConfig(experts=1)
    with pytest.raises(ConfigError, match="experts=0: expected 1 or more"):
        GPTConfig(experts=0)
    with pytest.raises(ConfigError, match="balance=True for a GPT without experts"):
        gpt(dataclasses.replace(CONFIG, experts=None)).apply(PARAMS, TOKENS, balance=True)
    with pytest.raises(ShapeError, match="experts_per_token=5: expected 1 to 4"):
        route(jnp.ones((2, 3)), jnp.ones((3, 4)), 5)
