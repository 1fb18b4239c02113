"""Tiers 1 and 2: every body of the fused loss against the textbook form in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import TOLERANCE, distance, double, races, strict_cuda, strict_tpu

from fnml.pallas_kernels import linear_cross_entropy
from fnml.pallas_kernels.linear_cross_entropy import _gpu


def _draw(N, D, V, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    x, w = jnp.asarray(rng.normal(size=(N, D)), dtype), jnp.asarray(rng.normal(size=(D, V)), dtype)
    weights = jnp.asarray(rng.random(N) * (rng.random(N) > 0.3), jnp.float32)
    return x, w, jnp.asarray(rng.integers(0, V, N), jnp.int32), weights


def _mean_and_grads(implementation="lax", interpret=None, **options):
    def run(x, w, labels, weights):
        def mean(x, w, weights):
            total, weight = linear_cross_entropy(
                x, w, labels, weights=weights, implementation=implementation,
                interpret=interpret, **options,
            )  # fmt: skip
            return total / weight

        return jax.value_and_grad(mean, (0, 1, 2))(x, w, weights)

    return run


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}])
def test_every_body_equals_the_textbook_form(options):
    # 700 tokens and 1,100 classes: two tiles by three, both padded.
    inputs = _draw(700, 24, 1100)
    want = double(_mean_and_grads("reference", **options), *inputs)
    for arguments in (("lax",), ("pallas", "tpu")):
        got = jax.jit(_mean_and_grads(*arguments, **options))(*inputs)
        assert distance(got, want) < TOLERANCE["float32"], arguments


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_floats_keep_wide_sums(dtype):
    inputs = _draw(130, 16, 140, dtype)
    want = double(_mean_and_grads("reference"), *inputs)
    for arguments in [("lax",), ("pallas", "tpu")][: 2 if dtype == "bfloat16" else 1]:
        got = jax.jit(_mean_and_grads(*arguments))(*inputs)
        assert got[0].dtype == jnp.float32
        assert got[1][1].dtype == dtype
        assert distance(got, want) < TOLERANCE[dtype], arguments


@settings(max_examples=5)
@given(
    N=st.integers(1, 40),
    V=st.integers(1, 9),
    chunk=st.sampled_from([None, 1, 7, 100]),
    smoothing=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_chunk_agree(N, V, chunk, smoothing, seed):
    x, w, labels, weights = _draw(N, 3, V, seed=seed)
    weights = weights.at[0].set(1.0)
    inputs = (x, w, labels, weights)
    want = double(_mean_and_grads("reference", label_smoothing=smoothing), *inputs)
    got = jax.jit(_mean_and_grads(chunk=chunk, label_smoothing=smoothing))(*inputs)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


def test_the_tpu_body_has_no_race_and_reads_no_foreign_memory():
    inputs = _draw(140, 8, 150)
    want = double(_mean_and_grads("reference", z_loss=0.1), *inputs)
    got = jax.jit(_mean_and_grads("pallas", strict_tpu(), z_loss=0.1))(*inputs)
    assert distance(got, want) < TOLERANCE["float32"]
    assert not races()


def test_the_gpu_body_equals_the_textbook_form():
    # 100 tokens and 140 classes are filled up to 128 and to two tiles, read as two parts.
    inputs, options = _draw(100, 64, 140, "bfloat16"), {"label_smoothing": 0.1, "z_loss": 1e-2}
    want = double(_mean_and_grads("reference", **options), *inputs)
    got = jax.jit(_mean_and_grads("pallas", "cuda", **options))(*inputs)
    assert got[1][1].dtype == jnp.bfloat16
    assert distance(got, want) < TOLERANCE["bfloat16"]


@pytest.mark.slow
def test_the_gpu_body_has_no_race_and_goes_by_chunks(monkeypatch):
    # A ring of three slots and four steps through two tiles of classes, and two chunks of tokens.
    monkeypatch.setattr(_gpu, "cuda_parts", lambda tiles, columns: 1)
    monkeypatch.setattr(_gpu, "cuda_chunk", lambda N, V: 128)
    inputs = _draw(200, 128, 256, "float16")
    want = double(_mean_and_grads("reference"), *inputs)
    got = jax.jit(_mean_and_grads("pallas", strict_cuda()))(*inputs)
    assert distance(got, want) < TOLERANCE["float16"]
    assert not races("cuda")


def test_totals_of_parts_add_up_and_masked_tokens_do_not_count():
    x, w, labels, weights = _draw(20, 4, 6)
    weights = weights.at[3].set(0.0)
    whole = linear_cross_entropy(x, w, labels, weights=weights)
    parts = [
        linear_cross_entropy(x[s], w, labels[s], weights=weights[s])
        for s in (slice(0, 5), slice(5, 20))
    ]
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-5)
    spoiled = x.at[3].set(jnp.nan)
    clean, broken = (_mean_and_grads()(a, w, labels, weights) for a in (x, spoiled))
    np.testing.assert_array_equal(clean[0], broken[0])
    np.testing.assert_array_equal(clean[1][1], broken[1][1])
    assert (broken[1][0][3] == 0).all()


def test_leading_axes_and_no_weights():
    x, w, labels, _ = _draw(24, 4, 6)
    flat = linear_cross_entropy(x, w, labels)
    folded = linear_cross_entropy(x.reshape(2, 12, 4), w, labels.reshape(2, 12))
    np.testing.assert_array_equal(flat, folded)
    assert float(flat[1]) == 24.0


def test_memory_does_not_grow_with_the_number_of_tokens():
    def temporary(N, implementation):
        x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((N, 16), (16, 4096)))
        labels = jax.ShapeDtypeStruct((N,), jnp.int32)

        def loss(x, w, labels):
            return linear_cross_entropy(x, w, labels, chunk=64, implementation=implementation)[0]

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, w, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4096, "lax") < 1.5 * temporary(1024, "lax")
    assert temporary(4096, "lax") < temporary(4096, "reference") / 8


def test_second_derivatives_agree():
    x, w, labels, weights = _draw(6, 3, 5)

    def product(implementation):
        def grad(x):
            return _mean_and_grads(implementation)(x, w, labels, weights)[1][0]

        return jax.grad(lambda x: (grad(x) ** 2).sum())(x), jax.jvp(grad, (x,), (x,))[1]

    assert distance(product("lax"), product("reference")) < TOLERANCE["float32"]


def test_what_does_not_fit_is_named():
    x, w, labels, _ = _draw(4, 3, 5)
    with pytest.raises(ValueError) as error:
        linear_cross_entropy(
            x, w.T, labels[:3], weights=jnp.ones(5), label_smoothing=1.0, z_loss=-1.0, chunk=0
        )
    for part in ("(5, 3)", "labels int32 (3,)", "weights (5,)", "=1.0", "z_loss=-1.0", "chunk=0"):
        assert part in str(error.value)
    with pytest.raises(NotImplementedError, match=r"tpu: dtype float16.*cuda: width 3"):
        linear_cross_entropy(
            x.astype("float16"), w.astype("float16"), labels, implementation="pallas"
        )
