"""Attention in C++: values and gradients, which calls it takes, one result for any threads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fewer_threads import printed_with_one_and_two
from hypothesis import given, settings
from hypothesis import strategies as st
from native_builds import scope, tiles_anyhow, with_tiles

from fnml.pallas_kernels import attention, native_faults, native_kernels

pytestmark = pytest.mark.skipif(bool(native_faults()), reason="; ".join(native_faults()))


def arrays(B, T, S, H, K, D, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(B, T, H, D), (B, S, K, D), (B, S, K, D), (B, T, H, D)]
    return [rng.normal(size=shape) for shape in shapes]


def with_gradients(q, k, v, grad, **options):
    out, back = jax.vjp(lambda *x: attention(*x, **options), q, k, v)
    return out, *back(grad)


def textbook(q, k, v, grad, left, right):
    """Value and gradients in float64, from the definition."""
    (B, T, H, D), (_, S, K, _) = q.shape, k.shape
    k, v = (np.repeat(x, H // K, 2) for x in (k, v))
    scores = np.einsum("bthd,bshd->bhts", q, k) * D**-0.5
    apart = np.arange(T)[:, None] - np.arange(S)[None, :]
    seen = (apart <= (T + S if left is None else left)) & (
        apart >= (-T - S if right is None else -right)
    )
    top = np.where(seen, scores, -np.inf).max(-1, keepdims=True)
    weights = np.exp(np.where(seen, scores - np.where(np.isfinite(top), top, 0), -np.inf))
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bhts,bshd->bthd", weights, v)
    to_weights = np.einsum("bthd,bshd->bhts", grad, v)
    inner = (to_weights * weights).sum(-1, keepdims=True)
    to_scores = weights * (to_weights - inner) * D**-0.5
    grad_q = np.einsum("bhts,bshd->bthd", to_scores, k)
    grad_k = np.einsum("bhts,bthd->bshd", to_scores, q).reshape(B, S, K, H // K, D).sum(3)
    grad_v = np.einsum("bhts,bthd->bshd", weights, grad).reshape(B, S, K, H // K, D).sum(3)
    return out, grad_q, grad_k, grad_v


def distance(x, y):
    """Relative, or to the size of the standard normal inputs where the expected is smaller."""
    return np.linalg.norm(np.asarray(x, np.float64) - y) / max(np.linalg.norm(y), y.size**0.5)


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 2),
    T=st.integers(16, 150),
    S=st.integers(1, 210),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]),
    D=st.sampled_from([16, 32, 48, 64, 80, 128]),
    left=st.none() | st.integers(0, 120),
    right=st.none() | st.integers(0, 120),
    tiles=st.booleans(),
)
def test_it_is_the_textbooks_in_float64_to_rounding(B, T, S, heads, D, left, right, tiles):
    compare_with_the_textbook(B, T, S, *heads, D, left, right, tiles=tiles)


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize(("left", "right"), [(None, 0), (None, None), (70, 3)])
def test_the_large_tiles_of_long_sequences_too(left, right, tiles):
    compare_with_the_textbook(1, 1100, 1030, 2, 1, 48, left, right, tiles=tiles)


@pytest.mark.parametrize(("T", "S", "D"), [(70, 1500, 64), (1050, 2100, 64)])
def test_keys_that_are_too_many_to_be_kept_packed(T, S, D):
    compare_with_the_textbook(1, T, S, 2, 1, D, 900, 40, tiles=True)


@pytest.mark.parametrize(("H", "K"), [(9, 9), (10, 5)])
def test_many_heads_of_which_a_thread_takes_some_at_once(H, K):
    compare_with_the_textbook(30, 66, 70, H, K, 32, None, 0, tiles=True)


def compare_with_the_textbook(B, T, S, H, K, D, left, right, *, tiles):
    given_arrays = arrays(B, T, S, H, K, D)
    wide = 10**6  # beyond either end is no bound
    window = (wide if left is None else left, wide if right is None else right)
    with scope(tiles):
        found = with_gradients(
            *(jnp.asarray(x, jnp.float32) for x in given_arrays),
            window=None if left is None and right is None else window,
            implementation="native",
        )
    expected = textbook(*given_arrays, left, right)
    # Sums of up to 1,100 products in float32: measured up to 6e-7.
    for x, y in zip(found, expected, strict=True):
        assert distance(x, y) < 2e-6


@pytest.mark.parametrize("size", [(40, 30, 16), (110, 100, 64)], ids=["vectors", "tiles"])
def test_large_scores_and_hidden_rows_stay_finite(size):
    T, S, D = size
    q, k, v, grad = (jnp.asarray(x, jnp.float32) for x in arrays(1, T, S, 2, 2, D))
    # The last queries, more than 5 beyond the last key, see nothing; scores reach thousands.
    found = with_gradients(300 * q, 10 * k, v, grad, window=(5, 0), implementation="native")
    expected = textbook(*(np.float64(x) for x in (300 * q, 10 * k, v, grad)), 5, 0)
    assert not found[0][:, S + 5 :].any() and not found[1][:, S + 5 :].any()
    assert all(np.isfinite(x).all() for x in found)
    assert distance(found[0], expected[0]) < 1e-3  # scores of 1e4 are exact to 1e-3


@pytest.mark.parametrize("D", [16, 64], ids=["vectors", "tiles"])
def test_what_a_query_does_not_see_changes_no_bit_and_a_nan_is_not_swallowed(D):
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in arrays(1, 64, 64, 1, 1, D))
    before, huge, lost = (
        attention(q, k, v.at[0, 40].set(x), causal=True, implementation="native")
        for x in (0.0, 1e30, jnp.nan)
    )
    np.testing.assert_array_equal(before[0, :40], huge[0, :40])
    assert (before[0, 40:] != huge[0, 40:]).all()
    assert np.isnan(lost[0, 40:]).all()
    for at in (0, 40):
        scores = attention(q, k.at[0, at].set(jnp.nan), v, causal=True, implementation="native")
        assert np.isnan(scores[0, at:]).all()


on_tiles = pytest.mark.skipif(
    bool(native_faults()) or not tiles_anyhow(),
    reason="this processor has no vectors of 16 to emulate tiles with",
)


def on_and_off(given_arrays):
    """Return the results with tiles and without."""
    x = [jnp.asarray(x, jnp.float32) for x in given_arrays]
    for tiles in (True, False):
        with native_kernels(with_tiles(), tiles=tiles):
            yield with_gradients(*x, causal=True, implementation="native")


@on_tiles
@pytest.mark.parametrize("size", [(1, 200, 200, 2, 1, 64), (2, 128, 128, 4, 4, 32)])
def test_tiles_lose_no_digit_to_vectors(size):
    given_arrays = arrays(*size)
    expected = textbook(*given_arrays, None, 0)
    for tiled, plain, wanted in zip(*on_and_off(given_arrays), expected, strict=True):
        assert not np.array_equal(tiled, plain)
        assert np.linalg.norm(tiled - wanted) <= 1.5 * np.linalg.norm(plain - wanted)


@on_tiles
@pytest.mark.parametrize("size", [(64, 64, 16), (63, 64, 32), (64, 63, 32)])
def test_small_sizes_do_without_tiles(size):
    T, S, D = size
    for tiled, plain in zip(*on_and_off(arrays(1, T, S, 2, 1, D)), strict=True):
        np.testing.assert_array_equal(tiled, plain)


@on_tiles
@pytest.mark.parametrize("odd", [np.inf, np.nan])
@pytest.mark.parametrize("where", range(4), ids=["q", "k", "v", "grad"])
def test_numbers_that_tiles_cannot_hold_are_multiplied_without(odd, where):
    given_arrays = arrays(1, 130, 130, 2, 1, 64)
    given_arrays[where][0, 100, 0, 5] = odd
    on, off = on_and_off(given_arrays)
    assert not all(np.isfinite(x).all() for x in on)
    for tiled, plain in zip(on, off, strict=True):
        # The forward pass knows nothing of the output's gradient: it takes tiles.
        if where == 3:
            tiled, plain = np.isnan(tiled), np.isnan(plain)
        np.testing.assert_array_equal(tiled, plain)


def _program(**options):
    def run(*x):
        return with_gradients(*x, **options)

    x = [jnp.asarray(x, jnp.float32) for x in arrays(1, 64, 64, 2, 2, 16)]
    return str(jax.make_jaxpr(run)(*x))


def test_auto_takes_it_in_the_scope_and_changes_nothing_outside():
    before = _program(causal=True)
    with native_kernels():
        inside = _program(causal=True)
        assert "fnml_attention_forward" in inside and "fnml_attention_backward" in inside
        assert "fnml" not in _program(causal=True, implementation="lax")
        assert "fnml" not in _program(causal=True, soft_cap=5.0)
    assert "fnml" not in before
    assert _program(causal=True) == before


def test_a_jitted_function_is_traced_apart_in_the_scope():
    @jax.jit
    def run(x):
        return attention(x, x, x)

    x = jnp.ones((1, 16, 1, 16))
    run(x)
    with native_kernels():
        assert "fnml_attention_forward" in run.lower(x).as_text()
    assert "fnml_attention_forward" not in run.lower(x).as_text()


def test_other_platforms_keep_their_bodies():
    x = jax.ShapeDtypeStruct((1, 64, 2, 16), jnp.float32)
    with native_kernels():
        traced = jax.jit(lambda x: attention(x, x, x)).trace(x)
        assert "fnml_attention" in traced.lower().as_text()
        for platform in ("tpu", "cuda", "rocm"):
            assert "fnml_attention" not in traced.lower(lowering_platforms=(platform,)).as_text()


def test_what_it_does_not_take_is_named():
    q = jnp.ones((1, 8, 2, 24), jnp.bfloat16)
    with pytest.raises(NotImplementedError) as caught:
        attention(q, q, q, soft_cap=2.0, implementation="native")
    for reason in ("float32", "multiples of 16", "8 queries", "soft_cap"):
        assert reason in str(caught.value)


def test_vmapped_it_is_the_lax_body_bit_for_bit():
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in arrays(3, 32, 32, 2, 2, 16))

    def loss(q, k, v):
        return attention(q[None], k[None], v[None], causal=True).sum()

    mapped = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2))))
    expected = mapped(q, k, v)
    with native_kernels():
        assert "fnml_attention" not in mapped.lower(q, k, v).as_text()
        for x, y in zip(mapped(q, k, v), expected, strict=True):
            np.testing.assert_array_equal(x, y)


def test_second_derivatives_are_those_of_the_lax_body():
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in arrays(1, 24, 24, 1, 1, 16))

    def slope(implementation, q):
        loss = lambda q: (attention(q, k, v, implementation=implementation) ** 2).sum()
        return (jax.grad(loss)(q) ** 2).sum()

    found, expected = (jax.grad(lambda q, n=n: slope(n, q))(q) for n in ("native", "reference"))
    assert distance(found, np.float64(expected)) < 1e-5


SCRIPT = """
import hashlib, sys, jax, jax.numpy as jnp
from fnml.pallas_kernels import attention
digest = hashlib.sha256()
for T, S, H, K, D in ((130, 130, 4, 2, 64), (300, 70, 1, 1, 64), (90, 90, 36, 36, 32), (17, 200, 2, 1, 16)):
    shapes = (1, T, H, D), (1, S, K, D), (1, S, K, D), (1, T, H, D)
    q, k, v, g = (jnp.sin(jnp.arange(float(a * b * c * d))).reshape(a, b, c, d) for a, b, c, d in shapes)
    for window in (None, (40, 0), (10**6, 0)):
        run = lambda *x: attention(*x, window=window, implementation="native")
        out, back = jax.vjp(jax.jit(run), q, k, v)
        for x in (out, *jax.jit(back)(g)):
            digest.update(bytes(memoryview(x)))
print(digest.hexdigest())
"""


def test_any_number_of_threads_gives_the_same_bits():
    one, two = printed_with_one_and_two(SCRIPT)
    assert one == two and len(one) == 64
