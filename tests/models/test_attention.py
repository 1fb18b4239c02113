import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from fnml.core import ShapeError
from fnml.models import causal_attention


def attention_reference(q, k, v):
    """The textbook form, with a T x T array."""
    T, H, D = q.shape[1:]
    k, v = (jnp.repeat(a, H // k.shape[2], axis=2) for a in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * D**-0.5
    scores = jnp.where(jnp.tril(jnp.ones((T, T), bool))[None, None], scores, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, -1), v)


def _draw(B, T, H, K, D, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(B, T, heads, D)).astype(dtype) for heads in (H, K, K))


def _value_and_grads(attention, q, k, v):
    def loss(q, k, v):
        return jnp.sin(attention(q, k, v)).sum()

    return attention(q, k, v), jax.grad(loss, (0, 1, 2))(q, k, v)


def _worst(got, want):
    errors = jax.tree.map(
        lambda a, b: np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b), got, want
    )
    return max(jax.tree.leaves(errors))


# 130: blocks of 64 and a remainder; 1300: segments of several blocks, and a remainder.
@pytest.mark.parametrize(
    ("B", "T", "H", "K", "D"), [(2, 130, 4, 2, 8), (1, 192, 2, 2, 4), (1, 1300, 2, 1, 4)]
)
def test_value_and_gradients_equal_the_textbook_form(B, T, H, K, D):
    inputs = _draw(B, T, H, K, D)
    with jax.enable_x64(True):
        double = [jnp.asarray(a) for a in inputs]
        want = jax.jit(lambda *a: _value_and_grads(attention_reference, *a))(*double)
        want = jax.tree.map(np.asarray, want)
        got = jax.jit(lambda *a: _value_and_grads(causal_attention, *a))(*double)
        assert _worst(got, want) < 1e-12
    got = jax.jit(lambda *a: _value_and_grads(causal_attention, *a))(
        *(jnp.asarray(a, jnp.float32) for a in inputs)
    )
    # Sums over up to 1,300 keys in float32.
    assert _worst(got, want) < 3e-6


@settings(max_examples=12, deadline=None)
@given(
    B=st.integers(1, 2),
    T=st.sampled_from([1, 2, 63, 64, 65]),
    K=st.integers(1, 2),
    G=st.integers(1, 3),
    D=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_shape_equals_the_textbook_form(B, T, K, G, D, seed):
    q, k, v = (jnp.asarray(a) for a in _draw(B, T, K * G, K, D, np.float32, seed))
    got, want = jax.jit(lambda *a: (causal_attention(*a), attention_reference(*a)))(q, k, v)
    assert _worst(got, np.asarray(want, np.float64)) < 3e-6


def test_differences_confirm_first_and_second_derivatives():
    with jax.enable_x64(True):
        inputs = tuple(jnp.asarray(a) for a in _draw(1, 5, 2, 1, 2))
        check_grads(causal_attention, inputs, order=2, modes=["rev"], eps=1e-4)


def test_the_future_changes_no_bit():
    q, k, v = (jnp.asarray(a) for a in _draw(1, 130, 2, 2, 4, np.float32))
    attention = jax.jit(causal_attention)
    changed = attention(q, k.at[:, 100:].add(3.0), v.at[:, 100:].mul(-2.0))
    plain = attention(q, k, v)
    np.testing.assert_array_equal(changed[:, :100], plain[:, :100])
    assert (changed[:, 100:] != plain[:, 100:]).all()


def test_large_scores_do_not_overflow():
    q, k, v = (jnp.asarray(a) * 100 for a in _draw(1, 70, 1, 1, 4, np.float32))
    value, grads = _value_and_grads(causal_attention, q, k, v)
    assert all(np.isfinite(a).all() for a in (value, *grads))


def _temporary_bytes(attention, T):
    shape = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
    grads = jax.jit(jax.grad(lambda q, k, v: jnp.sin(attention(q, k, v)).sum(), (0, 1, 2)))
    return grads.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_length():
    # Twice the length: the textbook form takes four times as much, ours about twice.
    ours = [_temporary_bytes(causal_attention, T) for T in (2048, 4096)]
    assert ours[1] / ours[0] < 2.5
    assert ours[1] < _temporary_bytes(attention_reference, 4096) / 4


def test_vmap_scan_and_checkpoint_agree():
    q, k, v = (jnp.asarray(a) for a in _draw(3, 70, 2, 1, 4, np.float32))

    def grads(q, k, v):
        loss = jax.checkpoint(lambda q, k, v: jnp.sin(causal_attention(q, k, v)).sum())
        return jax.grad(loss, (0, 1, 2))(q, k, v)

    want = jax.tree.map(np.asarray, jax.jit(grads)(q, k, v))
    one_by_one = tuple(a[:, None] for a in (q, k, v))
    mapped = jax.jit(jax.vmap(grads))(*one_by_one)
    scanned = jax.jit(lambda xs: jax.lax.scan(lambda _, x: (None, grads(*x)), None, xs)[1])(
        one_by_one
    )
    for got in (mapped, scanned):
        assert _worst([a[:, 0] for a in got], list(want)) < 1e-6


def test_bfloat16_inputs_keep_float32_sums():
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in _draw(1, 130, 2, 1, 8))
    got = causal_attention(q, k, v)
    want = attention_reference(*(a.astype(jnp.float32) for a in (q, k, v)))
    assert got.dtype == jnp.bfloat16
    # Weights and output are rounded to 8 bits once each.
    assert _worst(got.astype(jnp.float32), np.asarray(want, np.float64)) < 1e-2


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((1, 4, 3, 2), (1, 4, 2, 2), (1, 4, 2, 2)),
        ((1, 4, 2, 2), (1, 5, 2, 2), (1, 5, 2, 2)),
        ((1, 4, 2, 2), (1, 4, 2, 2), (1, 4, 1, 2)),
        ((4, 2, 2), (4, 2, 2), (4, 2, 2)),
    ],
)
def test_shapes_that_do_not_fit_are_all_named(q, k, v):
    with pytest.raises(ShapeError) as error:
        causal_attention(jnp.zeros(q), jnp.zeros(k), jnp.zeros(v))
    assert all(str(shape) in str(error.value) for shape in (q, k, v))
