import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import TOLERANCE, distance, races, strict_cuda, strict_tpu

from fnml.pallas_kernels import cache_update, decode_attention, paged_update, quantize_cache

BODIES = {
    "reference": {"implementation": "reference"},
    "lax": {"implementation": "lax"},
    "tpu": {"implementation": "pallas", "interpret": "tpu"},
}
B, H, K, D, S, PAGE = 3, 4, 2, 16, 24, 8
LENGTHS = jnp.array([2, 9, 24])


def _draw(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _textbook(q, k, v, lengths, window=None, soft_cap=None):
    """Each token and head by itself, in float64 NumPy."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    t, groups, out = q.shape[1], q.shape[2] // k.shape[2], np.zeros(q.shape)
    for b, i, h in np.ndindex(q.shape[:3]):
        at = int(lengths[b]) - t + i
        first = 0 if window is None else max(0, at - window + 1)
        if at < first:
            continue
        scores = k[b, first : at + 1, h // groups] @ q[b, i, h] / np.sqrt(q.shape[3])
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores - scores.max())
        out[b, i, h] = weights / weights.sum() @ v[b, first : at + 1, h // groups]
    return out


def _read(*arrays, k_scale=None, v_scale=None, **options):
    @jax.jit
    def run(arrays, k_scale, v_scale):
        return decode_attention(*arrays, k_scale=k_scale, v_scale=v_scale, **options)

    return run(arrays, k_scale, v_scale)


def _numbers(codes, scale):
    return np.asarray(codes, np.float64) * np.asarray(scale).swapaxes(1, 2)[..., None]


def _in_pages(cache, table, count, *, axis=1, unused=np.nan, page=PAGE):
    """Scatter [B, S, ...] over ``count`` pages, the rest of which holds ``unused``."""
    shape = list(cache.shape)
    shape[0], shape[axis] = count, page
    fill = unused if jnp.issubdtype(cache.dtype, jnp.floating) else 99
    pages = jnp.full(shape, fill, cache.dtype)
    return paged_update(pages, cache, table, jnp.zeros(cache.shape[0], jnp.int32), axis=axis)


TABLE = jnp.asarray(np.random.default_rng(5).permutation(12)[: B * S // PAGE].reshape(B, -1))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"soft_cap": 1.5}], ids=str)
@pytest.mark.parametrize("t", [1, 3])
def test_a_whole_cache_equals_float64(body, options, t):
    q, k, v = _draw(B, t, H, D), _draw(B, S, K, D, seed=1), _draw(B, S, K, D, seed=2)
    got = _read(q, k, v, LENGTHS, **options, **BODIES[body])
    assert distance(got, _textbook(q, k, v, LENGTHS, **options)) < TOLERANCE["float32"]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("int8", [False, True])
def test_pages_in_any_order_equal_the_whole_cache(body, int8):
    q, k, v = _draw(B, 2, H, D), _draw(B, S, K, D, seed=1), _draw(B, S, K, D, seed=2)
    scales, want = {}, _textbook(q, k, v, LENGTHS, window=7)
    # The hand-written body reads no page that is not a sequence's own: there NaN has to stay.
    unused = np.nan if body == "tpu" else 1e3
    if int8:
        (k, k_scale), (v, v_scale) = quantize_cache(k), quantize_cache(v)
        want = _textbook(q, _numbers(k, k_scale), _numbers(v, v_scale), LENGTHS, window=7)
        scales = {
            name: _in_pages(scale, TABLE, 12, axis=2, unused=unused)
            for name, scale in (("k_scale", k_scale), ("v_scale", v_scale))
        }
    else:
        # Nor does it trust the rest of a page that a sequence has begun.
        past = (jnp.arange(S)[None, :] >= LENGTHS[:, None])[:, :, None, None]
        k, v = (jnp.where(past, unused, cache) for cache in (k, v))
    k, v = (_in_pages(cache, TABLE, 12, unused=unused) for cache in (k, v))
    got = _read(q, k, v, LENGTHS, TABLE, window=7, **scales, **BODIES[body])
    assert distance(got, want) < TOLERANCE["float32"]


@pytest.mark.parametrize("body", BODIES)
def test_bfloat16_and_a_cache_of_bytes(body):
    q, k, v = (
        _draw(B, size, heads, D, seed=seed, dtype="bfloat16")
        for seed, (size, heads) in enumerate(((1, H), (S, K), (S, K)))
    )
    got = _read(q, k, v, LENGTHS, **BODIES[body])
    assert got.dtype == jnp.bfloat16
    want = _textbook(q, k, v, LENGTHS)
    assert distance(got, want) < TOLERANCE["bfloat16"]
    (k, k_scale), (v, v_scale) = quantize_cache(k), quantize_cache(v)
    got = _read(q, k, v, LENGTHS, k_scale=k_scale, v_scale=v_scale, **BODIES[body])
    # Rounding to 8 bits: steps of 1/127 of the largest of 16 numbers, uniform errors.
    assert distance(got, want) < 0.03


@settings(max_examples=3)
@given(
    t=st.integers(1, 3),
    groups=st.integers(1, 3),
    heads=st.integers(1, 3),
    size=st.integers(3, 20),
    window=st.none() | st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_odd_shapes(t, groups, heads, size, window, seed):
    q = _draw(2, t, heads * groups, 6, seed=seed)
    k, v = _draw(2, size, heads, 6, seed=seed + 1), _draw(2, size, heads, 6, seed=seed + 2)
    lengths = jnp.asarray(np.random.default_rng(seed).integers(0, size + 1, 2))
    want = _textbook(q, k, v, lengths, window=window)
    for body in ("lax", "tpu"):
        got = _read(q, k, v, lengths, window=window, **BODIES[body])
        assert distance(got, want) < 5e-6


def test_no_races_and_no_reads_out_of_bounds():
    q, k, v = _draw(B, 2, H, D), _draw(B, S, K, D, seed=1), _draw(B, S, K, D, seed=2)
    k, v = (_in_pages(cache, TABLE, 12) for cache in (k, v))
    options = {"implementation": "pallas", "interpret": strict_tpu()}
    got = decode_attention(q, k, v, LENGTHS, TABLE, **options)
    assert not races()
    want = decode_attention(q, jnp.nan_to_num(k), jnp.nan_to_num(v), LENGTHS, TABLE)
    assert distance(got, want) < TOLERANCE["float32"]


def _past_the_end(cache, lengths):
    return (jnp.arange(cache.shape[1])[None, :] >= lengths[:, None])[:, :, None, None]


def test_the_gpu_body_equals_float64_without_a_race():
    q, k, v = (
        _draw(2, size, heads, 64, seed=seed, dtype="float16")
        for seed, (size, heads) in enumerate(((2, 2), (128, 1), (128, 1)))
    )
    # The first sequence has a single token: its first query sees none.
    lengths = jnp.array([1, 100])
    want = _textbook(q, k, v, lengths, soft_cap=3.0)
    k, v = (jnp.where(_past_the_end(x, lengths), jnp.nan, x) for x in (k, v))
    options = {"implementation": "pallas", "interpret": strict_cuda()}
    got = _read(q, k, v, lengths, soft_cap=3.0, **options)
    assert got.dtype == jnp.float16
    assert distance(got, want) < TOLERANCE["float16"]
    assert not races("cuda")


@pytest.mark.slow
def test_the_gpu_body_cuts_a_sequence_into_parts():
    # 16 tiles go in two parts of two readers each; the window leaves them the last three.
    q, k, v = (
        _draw(1, size, heads, 64, seed=seed, dtype="bfloat16")
        for seed, (size, heads) in enumerate(((3, 4), (1024, 2), (1024, 2)))
    )
    lengths = jnp.array([1000])
    options = {"implementation": "pallas", "interpret": "cuda"}
    got = _read(q, k, v, lengths, window=100, **options)
    assert distance(got, _textbook(q, k, v, lengths, window=100)) < TOLERANCE["bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "int8"), [(16, False), (32, True), (128, True)], ids=["16", "32 int8", "128 int8"]
)
def test_the_gpu_body_reads_pages_and_codes(page, int8):
    # 160 tokens in small pages: the last tile of 64 has more than the table.
    size = 256 if page == 128 else 160
    pages, lengths, scales = size // page, jnp.array([131]), {}
    table = jnp.asarray(np.random.default_rng(5).permutation(pages + 2)[None, :pages])
    q, k, v = (
        _draw(1, count, heads, 64, seed=seed, dtype="float16")
        for seed, (count, heads) in enumerate(((1, 2), (size, 1), (size, 1)))
    )
    want = _textbook(q, k, v, lengths)
    if int8:
        (k, k_scale), (v, v_scale) = quantize_cache(k), quantize_cache(v)
        want = _textbook(q, _numbers(k, k_scale), _numbers(v, v_scale), lengths)
        scales = {
            name: _in_pages(scale, table, pages + 2, axis=2, page=page)
            for name, scale in (("k_scale", k_scale), ("v_scale", v_scale))
        }
    else:
        k, v = (jnp.where(_past_the_end(x, lengths), jnp.nan, x) for x in (k, v))
    k, v = (_in_pages(cache, table, pages + 2, page=page) for cache in (k, v))
    options = {"implementation": "pallas", "interpret": strict_cuda()}
    got = _read(q, k, v, lengths, table, **scales, **options)
    assert distance(got, want) < TOLERANCE["float16"]
    assert not races("cuda")


@pytest.mark.parametrize("int8", [False, True])
def test_long_caches_go_by_blocks_and_have_a_derivative(int8):
    # 600 tokens: two blocks of 256, and a third one that begins where the second one did not end.
    q, k, v = _draw(2, 1, 2, 8), _draw(2, 600, 2, 8, seed=1), _draw(2, 600, 2, 8, seed=2)
    lengths, scales, want = jnp.array([530, 600]), {}, (k, v)
    if int8:
        (k, k_scale), (v, v_scale) = quantize_cache(k), quantize_cache(v)
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        want = (_numbers(k, k_scale), _numbers(v, v_scale))

    def read(q, **options):
        return decode_attention(q, k, v, lengths, **scales, **options)

    assert distance(jax.jit(read)(q), _textbook(q, *want, lengths)) < TOLERANCE["float32"]
    slope = jax.jit(jax.grad(lambda q: jnp.sum(jnp.sin(read(q)))))(q)
    exact = jax.jit(jax.grad(lambda q: jnp.sum(jnp.sin(read(q, implementation="reference")))))(q)
    assert distance(slope, exact) < 1e-5


def test_codes_are_within_half_a_step_and_keep_zeros():
    x = _draw(2, 5, 3, 8).at[0, 1].set(0.0)
    codes, scale = quantize_cache(x)
    assert codes.dtype == jnp.int8
    assert scale.shape == (2, 3, 5)
    error = np.abs(_numbers(codes, scale) - np.asarray(x, np.float64))
    # Half a step, and float32's rounding of the quotient.
    assert (error <= (0.5 + 1e-5) * np.asarray(scale).swapaxes(1, 2)[..., None]).all()
    assert not np.asarray(codes[0, 1]).any()


def test_updates_write_where_they_should_and_nowhere_else():
    new = _draw(2, 3, 2, 4)
    got = cache_update(jnp.zeros((2, 9, 2, 4)), new, jnp.array([0, 5]))
    want = np.zeros((2, 9, 2, 4), np.float32)
    want[0, :3], want[1, 5:8] = new[0], new[1]
    np.testing.assert_array_equal(got, want)
    # Two pages of four: the first sequence crosses into its second page, the second one has none.
    table = jnp.array([[3, 1], [0, -1]])
    got = paged_update(jnp.zeros((4, 4, 2, 4)), new, table, jnp.array([2, 3]))
    want = np.zeros((4, 4, 2, 4), np.float32)
    want[3, 2:4], want[1, 0], want[0, 3] = new[0, :2], new[0, 2], new[1, 0]
    np.testing.assert_array_equal(got, want)
    beyond = paged_update(jnp.zeros((4, 4, 2, 4)), new, table, jnp.array([8, 8]))
    assert not np.asarray(beyond).any()


def test_misuse_is_refused_with_every_fault():
    q, k = jnp.ones((2, 1, 4, 8)), jnp.ones((2, 5, 3, 8))
    with pytest.raises(ValueError, match=r"H a multiple of K; lengths are float32 \(3,\)"):
        decode_attention(q, k, k, jnp.ones(3))
    codes = jnp.ones((2, 5, 2, 8), jnp.int8)
    with pytest.raises(
        ValueError, match=r"k_scale is needed for a cache of int8.*v_scale is needed"
    ):
        decode_attention(q, codes, codes, jnp.array([1, 2]))
    whole = jnp.ones((2, 5, 2, 8))
    with pytest.raises(ValueError, match=r"window=0.*soft_cap=-1"):
        decode_attention(q, whole, whole, jnp.array([1, 2]), window=0, soft_cap=-1.0)
    prompt = jnp.ones((2, 300, 4, 8))
    with pytest.raises(NotImplementedError, match=r"attention\(\) is for prompts"):
        decode_attention(prompt, whole, whole, jnp.array([1, 2]), implementation="pallas")
    narrow = jnp.ones((2, 100, 4, 32))
    with pytest.raises(NotImplementedError, match=r"float16.*head width 32.*a cache of 100 tokens"):
        decode_attention(
            narrow, narrow, narrow, jnp.array([1, 2]), implementation="pallas", interpret="cuda"
        )
    codes, scale = jnp.ones((9, 16, 1, 64), jnp.int8), jnp.ones((9, 1, 16))
    with pytest.raises(NotImplementedError, match=r"pages of 16 tokens \(it takes 32 and"):
        decode_attention(
            jnp.ones((2, 1, 1, 64), jnp.bfloat16), codes, codes, jnp.array([1, 2]),
            jnp.zeros((2, 4), jnp.int32), k_scale=scale, v_scale=scale,
            implementation="pallas", interpret="cuda",
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"expected \[P, page"):
        paged_update(whole, whole, jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.int32))
