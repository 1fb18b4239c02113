"""remat: the same values and gradients from less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import primitives

from fnml.core import ConfigError, Mean, Metrics
from fnml.transforms import remat

LAYERS, WIDTH, BATCH = 6, 8, 4
POLICIES = [
    "nothing",
    "dots",
    "dots_no_batch",
    "everything",
    ("hidden",),
    jax.checkpoint_policies.dots_saveable,
]


@jax.custom_vjp
def clipped(x):
    """Return ``x``, with a gradient of our own: 7 times what it would be."""
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (7.0 * g,))


def deep(params, batch, key, *, state=None, train=False):
    """Run a scanned stack with dropout, an integer input, a jitted part and options."""
    x = params["embed"][batch["tokens"]]

    @jax.jit
    def stack(x, layers):
        def layer(x, w):
            i, w, b = w
            h = checkpoint_name(x @ w, "hidden") + b.reshape(1, -1)
            if train:
                kept = jax.random.bernoulli(jax.random.fold_in(key, i), 0.8, h.shape)
                h = jnp.where(kept, h, 0.0)
            return x + clipped(jax.nn.gelu(h)), jnp.mean(h)

        return jax.lax.scan(layer, x, (jnp.arange(LAYERS), layers["w"], layers["b"]))

    x, means = stack(x, params["layers"])
    logits = jax.nn.relu(x) @ params["head"]
    if state is not None:
        logits = logits * state["scale"]
    loss = Mean.of(jax.nn.logsumexp(logits, axis=-1))
    return loss.value, Metrics(loss.weight, {"mean": Mean.of(means)}, None)


def make():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) / 3, jnp.float32)

    params = {
        "embed": draw(11, WIDTH),
        "head": draw(WIDTH, 3),
        "layers": {"w": draw(LAYERS, WIDTH, WIDTH), "b": draw(LAYERS, WIDTH)},
    }
    return params, {"tokens": jnp.arange(BATCH, dtype=jnp.int32)}, jax.random.key(0)


OPTIONS = {"state": {"scale": jnp.float32(1.5)}, "train": True}


def evaluate(function, jit=True):
    def run(params, batch, key):
        return jax.value_and_grad(function, has_aux=True)(params, batch, key, **OPTIONS)

    return (jax.jit(run) if jit else run)(*make())


def assert_same(a, b):
    """Compare to some ulps of float32, relative to each array's norm: XLA may fuse otherwise."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        x, y = np.float64(x), np.float64(y)
        assert np.linalg.norm(x - y) <= 1e-6 * np.linalg.norm(y)


@pytest.fixture(scope="module")
def plain():
    return evaluate(deep)


@pytest.mark.parametrize("scope", ["layers", "whole"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_value_metrics_and_gradients_stay(policy, scope, plain):
    assert_same(evaluate(remat(deep, policy, scope=scope)), plain)


@pytest.mark.parametrize("scope", ["layers", "whole"])
def test_the_value_alone_stays_without_jit(scope):
    args = make()
    assert_same(remat(deep, scope=scope)(*args, **OPTIONS), deep(*args, **OPTIONS))


@pytest.mark.parametrize("scope", ["layers", "whole"])
def test_options_reach_the_function_and_gradients_flow_through_them(scope):
    args = make()

    def by_state(function):
        return jax.grad(lambda s: function(*args, state={"scale": s}, train=True)[0])

    scale = jnp.float32(1.5)
    wrapped = remat(deep, scope=scope)
    assert_same(jax.jit(by_state(wrapped))(scale), jax.jit(by_state(deep))(scale))
    assert float(wrapped(*args, train=True)[0]) != float(wrapped(*args, train=False)[0])


def test_a_scan_is_found_through_jit_in_jit():
    inner = jax.jit(lambda x: jax.lax.scan(lambda c, u: (jnp.sin(c * u), None), 1.0, x)[0])
    outer = jax.jit(lambda x: inner(x) + 1.0)
    [body] = scans(jax.make_jaxpr(remat(outer))(jnp.ones(3)).jaxpr)
    assert [eqn.primitive for eqn in body.eqns] == [primitives.remat_p]


@pytest.mark.parametrize("scope", ["layers", "whole"])
def test_a_custom_gradient_inside_a_scanned_layer_is_kept(scope):
    def power(x):
        return jax.lax.scan(lambda x, _: (clipped(x), None), x, None, length=3)[0]

    assert float(jax.grad(remat(power, scope=scope))(jnp.float32(2.0))) == 7.0**3


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jax.nn.relu(x).sum(),
        lambda x: clipped(x * x).sum(),
        lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x).sum(),
        lambda x: jax.lax.fori_loop(0, 3, lambda i, x: x * x, x).sum(),
        lambda x: jax.vmap(lambda v: jax.lax.scan(lambda c, u: (c * u, c), 1.0, v)[1])(x).sum(),
        lambda x: jax.lax.scan(lambda c, u: (c + u, c * c * u), jnp.zeros(3), x, reverse=True)[
            1
        ].sum(),
        lambda x: jax.lax.scan(lambda c, u: (jnp.sin(c + u), None), jnp.ones(3), x, unroll=2)[
            0
        ].sum(),
        lambda x: jnp.sort(x, axis=0)[0].sum() + jnp.linalg.norm(x),
    ],
    ids=["relu", "custom_vjp", "cond", "fori", "vmap", "reverse", "unroll", "numpy"],
)
def test_functions_of_every_make_keep_value_and_gradient(function):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    expected = jax.jit(jax.value_and_grad(function))(x)
    assert_same(jax.jit(jax.value_and_grad(remat(function)))(x), expected)


def scans(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn.params["jaxpr"].jaxpr
        elif eqn.primitive.name == "jit":
            yield from scans(eqn.params["jaxpr"].jaxpr)


def test_the_body_of_the_scan_is_one_rematerialised_call():
    bodies = list(scans(jax.make_jaxpr(remat(deep))(*make()).jaxpr))
    assert [[eqn.primitive for eqn in body.eqns] for body in bodies] == [[primitives.remat_p]]
    [plain_body] = scans(jax.make_jaxpr(deep)(*make()).jaxpr)
    assert len(plain_body.eqns) > 3


def test_the_memory_of_a_deep_model_falls():
    def stack(w, x):
        def layer(x, w):
            for _ in range(4):
                x = jnp.tanh(x @ w)
            return x, None

        return jnp.sum(jax.lax.scan(layer, x, w)[0])

    shapes = jax.ShapeDtypeStruct((16, 32, 32), jnp.float32), jnp.zeros((512, 32))

    def temporary(function):
        compiled = jax.jit(jax.grad(function)).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    plain = temporary(stack)
    # Four activations a layer become one; the layer at work adds four of its own.
    assert temporary(remat(stack)) < 0.5 * plain
    assert temporary(remat(stack, "everything")) > 0.9 * plain


def test_an_unknown_policy_or_scope_is_named():
    with pytest.raises(ConfigError, match=r"'dotz'.*nothing, dots.*Did you mean 'dots'"):
        remat(deep, "dotz")
    with pytest.raises(ConfigError, match="'layers' or 'whole', got 'layer'"):
        remat(deep, scope="layer")
