"""Tiers 1 and 2: every body of attention against the textbook form in float64."""

import re
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    TOLERANCE,
    custom_calls,
    distance,
    double,
    pallas_calls,
    races,
    strict_cuda,
    strict_tpu,
)

from fnml.pallas_kernels import _compiler, attention
from fnml.pallas_kernels.attention import _by_head

KEY = jax.random.key(3)


def _draw(B, T, S, H, K, D, dtype=np.float32, seed=0):
    """Draw q, k, v and a gradient, rounded to ``dtype``."""
    rng = np.random.default_rng(seed)
    shapes = ((B, T, H, D), (B, S, K, D), (B, S, K, D), (B, T, H, D))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def _value_and_grads(implementation, interpret=None, **options):
    """Return a function of q, k, v, grad and the bias, giving the output and all gradients."""

    def run(q, k, v, grad, bias=None):
        def call(q, k, v, bias):
            return attention(
                q, k, v, bias=bias, **options, implementation=implementation, interpret=interpret
            )

        out, back = jax.vjp(call, q, k, v, bias)
        return out, back(grad.astype(out.dtype))

    return run


def _extras(name, B, T, S, H):
    """Return the named set of options, and a bias or none."""
    rng = np.random.default_rng(1)
    if name == "causal":
        return {"causal": True}, ()
    if name == "full, scaled":
        return {"scale": 0.3}, ()
    if name == "window, segments, soft cap":
        own, other = (jnp.asarray(np.sort(rng.integers(0, 3, (B, n)))) for n in (T, S))
        return {"window": (20, 11), "segment_ids": (own, other), "soft_cap": 1.5}, ()
    mask = jnp.asarray(rng.random((1, H, T, S)) > 0.4)
    lengths = jnp.asarray([S // 2, 0][:B])
    bias = jnp.asarray(rng.normal(size=(B, H, T, S)), jnp.float32)
    options = {"causal": True, "mask": mask, "lengths": lengths, "dropout": 0.3, "key": KEY}
    return options, (bias,)


NAMES = ["causal", "full, scaled", "window, segments, soft cap", "bias, mask, lengths, dropout"]


@pytest.mark.parametrize("name", NAMES)
def test_every_body_equals_the_textbook_form(name):
    # 600 queries and 700 keys: several tiles of the TPU's, padded, and segments of blocks of lax.
    B, T, S, H, K = 2, 600, 700, 2, 1
    inputs = _draw(B, T, S, H, K, 16)
    options, bias = _extras(name, B, T, S, H)
    want = double(_value_and_grads("reference", **options), *inputs, *bias)
    for arguments in (("lax",), ("pallas", "tpu")):
        got = jax.jit(_value_and_grads(*arguments, **options))(*inputs, *bias)
        assert distance(got, want) < TOLERANCE["float32"], arguments


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_floats_keep_wide_sums(dtype):
    inputs = _draw(1, 130, 130, 2, 1, 16, dtype)
    want = double(_value_and_grads("reference", causal=True), *inputs)
    bodies = [("lax",), ("pallas", "tpu")][: 2 if dtype == "bfloat16" else 1]
    for arguments in bodies:
        got = jax.jit(_value_and_grads(*arguments, causal=True))(*inputs)
        assert got[0].dtype == got[1][0].dtype == dtype
        assert distance(got, want) < TOLERANCE[dtype], arguments


@settings(max_examples=5)
@given(
    T=st.sampled_from([1, 65, 129]),
    S=st.sampled_from([1, 64, 130]),
    K=st.integers(1, 2),
    G=st.integers(1, 2),
    causal=st.booleans(),
    window=st.sampled_from([None, 0, 9, (3, 40)]),
    ragged=st.booleans(),
    broadcast=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_and_options_agree(T, S, K, G, causal, window, ragged, broadcast, seed):
    inputs = _draw(2, T, S, K * G, K, 4, seed=seed)
    if causal and isinstance(window, tuple):
        window = (window[0], 0)
    options = {"causal": causal, "window": window}
    if ragged:
        options["lengths"] = jnp.asarray([seed % (S + 1), S])
    rng = np.random.default_rng(seed)
    shape = (1, K * G, 1, S) if broadcast else (2, 1, T, 1)
    bias = jnp.asarray(rng.normal(size=shape), jnp.float32)
    want = double(_value_and_grads("reference", **options), *inputs, bias)
    got = jax.jit(_value_and_grads("lax", **options))(*inputs, bias)
    assert distance(got[0], want[0]) < TOLERANCE["float32"]
    # A bias that is one number per query moves no weight: its gradient is 0 but for rounding.
    np.testing.assert_allclose(got[1][3], want[1][3], atol=2e-5)
    # A single key has all the weight whatever the scores: gradients of 0 but for rounding.
    for a, b in zip(got[1][:3], want[1][:3], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * max(1, np.abs(b).max()) + 2e-6)


@pytest.mark.parametrize("name", [NAMES[0], NAMES[3]])
def test_the_tpu_body_has_no_race_and_reads_no_foreign_memory(name):
    inputs = _draw(1, 130, 260, 2, 1, 8)
    options, bias = _extras(name, 1, 130, 260, 2)
    want = double(_value_and_grads("reference", **options), *inputs, *bias)
    got = jax.jit(_value_and_grads("pallas", strict_tpu(), **options))(*inputs, *bias)
    assert distance(got, want) < TOLERANCE["float32"]
    assert not races()


@pytest.mark.slow
def test_the_gpu_body_equals_the_textbook_form_without_a_race():
    # Backward four tiles go through a ring of two slots, from two heads of one group.
    inputs = _draw(1, 128, 256, 2, 1, 64, "float16")
    options = {"window": (90, 170)}
    want = double(_value_and_grads("reference", **options), *inputs)
    got = jax.jit(_value_and_grads("pallas", strict_cuda(), **options))(*inputs)
    assert distance(got, want) < TOLERANCE["float16"]
    assert not races("cuda")


def test_every_body_drops_the_same_weights():
    identity = jnp.broadcast_to(jnp.eye(96)[None, :, None, :], (1, 96, 2, 96))
    zeros = jnp.zeros((1, 96, 2, 96))

    def dropped(implementation):
        # With equal scores and the unit matrix for values, the output is the weights themselves.
        return attention(
            zeros, zeros, identity, dropout=0.25, key=KEY, implementation=implementation
        )

    weights = {name: np.asarray(dropped(name)) for name in ("reference", "lax")}
    np.testing.assert_array_equal(weights["lax"] > 0, weights["reference"] > 0)
    np.testing.assert_allclose(weights["lax"][weights["lax"] > 0], 1 / (96 * 0.75), rtol=1e-5)
    # 18,432 draws: the share's standard deviation is 0.0032, neighbours are independent.
    kept = weights["lax"] > 0
    assert abs(kept.mean() - 0.75) < 0.013
    for axis in (1, 2, 3):
        a, b = (np.take(kept, range(s, kept.shape[axis] - 1 + s), axis) for s in (0, 1))
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.03
    # Without the key nothing is dropped.
    np.testing.assert_allclose(
        attention(zeros, zeros, identity, dropout=0.25), np.full_like(zeros, 1 / 96), rtol=1e-5
    )


def test_a_query_without_keys_gets_zero_and_no_gradient():
    q, k, v, grad = _draw(1, 5, 6, 1, 1, 4)
    segments = (jnp.asarray([[0, 0, 1, 2, 9]]), jnp.asarray([[0, 0, 1, 2, 2, 2]]))
    out, (back_q, *_) = _value_and_grads("lax", segment_ids=segments)(q, k, v, grad)
    assert (out[:, 4] == 0).all() and (back_q[:, 4] == 0).all()
    assert (out[:, :4] != 0).any() and np.isfinite(back_q).all()


def test_keys_that_are_not_seen_change_no_bit():
    q, k, v, _ = _draw(1, 300, 300, 2, 1, 8)

    @jax.jit
    def run(k, v):
        return attention(q, k, v, causal=True, window=20, lengths=jnp.asarray([290]))

    plain, other = run(k, v), run(k.at[:, 200:].add(3.0), v.at[:, 200:].mul(-2.0))
    np.testing.assert_array_equal(plain[:, :200], other[:, :200])
    assert (plain[:, 200:280] != other[:, 200:280]).all()
    end = run(k.at[:, 290:].add(3.0), v.at[:, 290:].mul(-2.0))
    np.testing.assert_array_equal(plain, end)


def _temporary_bytes(T, **options):
    shape = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
    grads = jax.grad(lambda q, k, v: attention(q, k, v, **options).sum(), (0, 1, 2))
    compiled = jax.jit(grads).lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_length_with_a_window_too():
    small, large = (_temporary_bytes(T, window=(100, 28)) for T in (1024, 4096))
    assert large / small < 4.5
    assert large < _temporary_bytes(4096, implementation="reference") / 50


def test_forward_mode_and_second_derivatives():
    q, k, v, _ = _draw(1, 6, 6, 1, 1, 4)

    def loss(q, implementation):
        return jnp.sin(attention(q, k, v, causal=True, implementation=implementation)).sum()

    def products(implementation):
        grad = jax.grad(lambda q: loss(q, implementation))
        forward = jax.jvp(grad, (q,), (v,))[1]
        back = jax.grad(lambda q: (grad(q) * v).sum())(q)
        return forward, back

    want = products("reference")
    assert distance(products("lax"), want) < TOLERANCE["float32"]
    assert distance(want[0], want[1]) < TOLERANCE["float32"]
    jax.jvp(lambda q: loss(q, "reference"), (q,), (v,))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: loss(q, "lax"), (q,), (v,))


def test_second_derivatives_of_a_kernel_go_through_the_lax_body():
    q, k, v, _ = _draw(1, 512, 512, 1, 1, 8)

    def product(**options):
        grad = jax.grad(lambda q: jnp.sin(attention(q, k, v, causal=True, **options)).sum())
        return jax.jit(jax.grad(lambda q: (grad(q) * v).sum()))(q)

    # "auto" has a choice by platform in it at this length.
    assert distance(product(), product(implementation="reference")) < TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1, 4, 3, 2)}, r"k float32 \(1, 4, 3, 2\).* expected one floating dtype"),
        ({"window": -1}, r"window=-1: expected a number of 0 or more"),
        ({"window": (1, 1), "causal": True}, "nothing is seen to the right"),
        ({"lengths": jnp.zeros((2,), jnp.int32)}, r"lengths int32 \(2,\): expected integers \(1,"),
        ({"mask": jnp.zeros((1, 2, 3, 4))}, r"mask \(1, 2, 3, 4\).*mask of float32: expected bool"),
        ({"segment_ids": jnp.zeros((1, 4))}, r"segment_ids float32 \(1, 4\)"),
        ({"dropout": 1.0, "soft_cap": -1.0}, r"soft_cap=-1.0.*dropout=1.0"),
        ({"implementation": "palas"}, "got implementation='palas'.*Did you mean 'pallas'"),
        ({"interpret": "tpu"}, "only a Pallas body can be interpreted"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    shapes = {"q": (1, 4, 2, 2), "k": (1, 4, 2, 2), "v": (1, 4, 2, 2)}
    shapes |= {name: value for name, value in change.items() if name in shapes}
    options = {name: value for name, value in change.items() if name not in shapes}
    with pytest.raises(ValueError, match=message):
        attention(*(jnp.zeros(shape) for shape in shapes.values()), **options)


def test_another_gpu_than_hopper_gets_the_lax_body(monkeypatch):
    q = jax.ShapeDtypeStruct((1, 512, 2, 64), jnp.bfloat16)
    device = SimpleNamespace(compute_capability="8.0")

    def calls():
        return pallas_calls(custom_calls(lambda q: attention(q, q, q), (q,), "cuda")["cuda"])

    assert calls() == 1
    monkeypatch.setattr(_compiler.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_compiler.jax, "local_devices", lambda: [device])
    assert calls() == 0


def test_a_body_that_cannot_do_it_says_why_and_what_can():
    q, k, v, _ = _draw(1, 100, 100, 2, 2, 24)
    with pytest.raises(NotImplementedError) as error:
        attention(q, k, v, soft_cap=2.0, implementation="pallas", interpret="cuda")
    text = str(error.value)
    for part in ("float32", "head width 24", "T=100", "soft_cap", "can do it: reference, lax, tpu"):
        assert part in text
    with pytest.raises(NotImplementedError, match="cudnn: dtype float32"):
        attention(q, k, v, implementation="cudnn")
    # Nothing falls back silently: on this platform there is no compiled kernel.
    with pytest.raises(NotImplementedError, match="platform"):
        jax.jit(lambda q: attention(q, k, v, implementation="pallas"))(q)


@pytest.mark.parametrize("options", ["causal", "segments", "lengths", "soft cap"])
def test_head_by_head_equals_float64(monkeypatch, options):
    monkeypatch.setattr(_by_head, "BY_HEAD", 64)
    monkeypatch.setattr(_by_head, "BY_HEAD_BLOCK", 16)
    arrays, rng = _draw(2, 150, 70, 4, 2, 8), np.random.default_rng(2)
    segments = tuple(jnp.asarray(np.sort(rng.integers(0, 3, (2, n)))) for n in (150, 70))
    given = {
        "causal": {"causal": True},
        "segments": {"segment_ids": segments},
        "lengths": {"lengths": jnp.array([70, 31]), "causal": True},
        "soft cap": {"soft_cap": 1.5},
    }[options]
    run = jax.jit(_value_and_grads("lax", **given))
    assert "while" in run.lower(*arrays).as_text()
    got = run(*arrays)
    want = double(_value_and_grads("reference", **given), *arrays)
    assert distance(got, want) < TOLERANCE["float32"]


def test_head_by_head_is_for_cpus_alone(monkeypatch):
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _draw(1, 2048, 2048, 2, 2, 8)]

    def operations(run, platform):
        text = run.lower(lowering_platforms=(platform,)).as_text()
        # Which constants are shared, and where they stand, is no difference.
        return Counter(re.findall(r"= stablehlo\.(?!constant)(\w+)", text))

    def programs():
        # A new function each time: what was traced before is kept by function.
        run = jax.jit(_value_and_grads("lax", causal=True)).trace(*arrays)
        return {name: operations(run, name) for name in ("cpu", "tpu", "cuda", "rocm")}

    chosen = programs()
    monkeypatch.setattr(_by_head, "BY_HEAD", 4096)
    plain = programs()
    assert chosen["cpu"] != plain["cpu"]
    for platform in ("tpu", "cuda", "rocm"):
        assert chosen[platform] == plain[platform]


def _forced(platform):
    """Return a ``platform_dependent`` that takes one platform's branch wherever it runs."""
    return lambda *operands, default, **by: by.get(platform, default)(*operands)


@pytest.mark.parametrize(
    "options", ["causal", "window", "segments", "lengths", "soft cap", "bias", "mask", "dropout"]
)
def test_short_attention_as_tpus_and_gpus_run_it_equals_float64(monkeypatch, options):
    arrays, rng = _draw(2, 90, 70, 4, 2, 8), np.random.default_rng(2)
    segments = tuple(jnp.asarray(np.sort(rng.integers(0, 3, (2, n)))) for n in (90, 70))
    mask = rng.integers(0, 2, (2, 1, 90, 70)).astype(bool)
    given = {
        "causal": {"causal": True},
        "window": {"window": (100, 3)},
        "segments": {"segment_ids": segments},
        "lengths": {"lengths": jnp.array([70, 31]), "causal": True},
        "soft cap": {"soft_cap": 1.5},
        "bias": {},
        "mask": {"mask": jnp.asarray(mask & (np.arange(90) > 0)[:, None])},
        "dropout": {"dropout": 0.3, "key": jax.random.key(3)},
    }[options]
    if options == "bias":
        arrays = (*arrays, jnp.asarray(rng.normal(size=(1, 4, 90, 70)), jnp.float32))
    want = double(_value_and_grads("reference", **given), *arrays)
    monkeypatch.setattr(_by_head.lax, "platform_dependent", _forced("tpu"))
    run = jax.jit(_value_and_grads("lax", **given)).trace(*arrays)
    # All scores at once: no loop over blocks. (Drawing a seed has one.)
    assert options == "dropout" or "while" not in run.lower().as_text()
    assert distance(run.lower().compile()(*arrays), want) < TOLERANCE["float32"]


def test_short_attention_on_cpus_is_what_it_would_be_without_the_other_form(monkeypatch):
    arrays = _draw(2, 100, 100, 2, 2, 8)

    def run():
        return jax.jit(_value_and_grads("lax", causal=True))(*arrays)

    chosen = run()
    monkeypatch.setattr(_by_head, "WORTH", 0)
    jax.tree.map(np.testing.assert_array_equal, chosen, run())
