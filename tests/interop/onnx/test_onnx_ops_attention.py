import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from one_op import in_importer, one_op, same

from fnml.interop.onnx import from_onnx

B, H, K, T, S, D = 2, 4, 2, 3, 5, 4
RNG = np.random.default_rng(0)


def normal(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


def textbook(q, k, v, mask=None, causal=False, past=0, lengths=None, cap=0.0, left=-1, right=-1):
    """Loop over every query in float64; one head of keys serves several of queries."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, h, t in np.ndindex(*q.shape[:3]):
        keys, values = k[b, h * k.shape[1] // q.shape[1]], v[b, h * v.shape[1] // q.shape[1]]
        scores = keys @ q[b, h, t] / np.sqrt(q.shape[-1])
        if cap:
            scores = cap * np.tanh(scores / cap)
        if mask is not None:
            shown = np.broadcast_to(mask, (*q.shape[:3], mask.shape[-1]))[b, h, t]
            scores = np.where(shown, scores, -np.inf) if shown.dtype == bool else scores + shown
        own = t + past if lengths is None else t + lengths[b] - q.shape[2]
        for s in range(len(scores)):
            hidden = causal and s > own
            hidden |= right >= 0 and s > own + right
            hidden |= left >= 0 and s < own - left
            hidden |= lengths is not None and s >= lengths[b]
            scores[s] = -np.inf if hidden else scores[s]
        if np.isfinite(scores).any():
            weights = np.exp(scores - scores.max())
            out[b, h, t] = weights / weights.sum() @ values
    return out


def attend(inputs, outputs=1, opset=25, **attributes):
    wanted = [np.float32] * outputs
    return in_importer(one_op("Attention", inputs, wanted, opset, **attributes), inputs)


@pytest.mark.parametrize("mask", ["none", "boolean", "float"])
@pytest.mark.parametrize("causal", [0, 1])
def test_attention_equals_the_textbook(causal, mask):
    q, k, v = normal(B, H, T, D), normal(B, K, S, D), normal(B, K, S, D + 1)
    masks = {"none": None, "boolean": RNG.uniform(size=(B, 1, T, S)) < 0.6, "float": normal(T, S)}
    inputs = [q, k, v, masks[mask]]
    (got,) = attend(inputs, is_causal=causal, softcap=0.7)
    expected = textbook(*inputs, causal=causal, cap=0.7)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [(-1, -1), (1, 0), (0, 1), (2, -1)])
def test_windows_and_lengths_equal_the_textbook(window):
    q, k, v = normal(B, H, T, D), normal(B, K, S, D), normal(B, K, S, D)
    # The first sample has fewer keys than queries: its first rows see nothing and are zero.
    lengths = np.array([2, 5], np.int64)
    left, right = window
    inputs = [q, k, v, None, None, None, lengths]
    (got,) = attend(inputs, is_causal=1, left_window_size=left, right_window_size=right)
    expected = textbook(q, k, v, causal=True, lengths=lengths, left=left, right=right)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert not np.asarray(got)[0, :, 0].any()
    past = [normal(B, K, 2, D), normal(B, K, 2, D)]
    got, key, value = attend(
        [q, k, v, None, *past], 3, left_window_size=left, right_window_size=right
    )
    np.testing.assert_array_equal(key, np.concatenate([past[0], k], axis=2))
    np.testing.assert_array_equal(value, np.concatenate([past[1], v], axis=2))
    expected = textbook(q, np.asarray(key), np.asarray(value), past=2, left=left, right=right)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_attention_equals_onnxruntime():
    q, k, v = normal(B, T, H * D), normal(B, S, K * D), normal(B, S, K * D)
    past = [normal(B, K, 2, D), normal(B, K, 2, D)]
    inputs = [q, k, v, normal(T, S + 2), *past]
    heads = {"q_num_heads": H, "kv_num_heads": K}
    outputs = [np.float32] * 4
    for mode in range(4):
        same("Attention", inputs, outputs, 23, rtol=1e-4, qk_matmul_output_mode=mode, **heads)


def test_attention_gradient_past_rows_that_see_nothing():
    with jax.enable_x64(True):
        inputs = [normal(1, 2, 3, 2, dtype=np.float64) for _ in range(3)]
        mask = np.array([[True, False, True], [False] * 3, [True] * 3])
        model = one_op("Attention", [*inputs, mask], [np.float64], 24)
        imported, params = from_onnx(model)
        run = jax.jit(lambda *xs: imported.apply(params, *xs, mask))
        check_grads(run, [jnp.asarray(x) for x in inputs], 1, modes=["rev"])


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_embedding_equals_onnxruntime(interleaved):
    x = normal(B, H, T, 6)
    angle = np.arange(7)[:, None] * np.array([1.0, 0.3])
    caches = [f(angle).astype(np.float32) for f in (np.cos, np.sin)]
    places = np.array([[0, 1, 2], [4, 5, 6]], np.int64)
    # Four of six entries are turned.
    attributes = {"interleaved": interleaved, "rotary_embedding_dim": 4}
    (got,) = in_importer(
        one_op("RotaryEmbedding", [x, *caches, places], opset=23, **attributes),
        [x, *caches, places],
    )
    pairs = x[..., :4].reshape(B, H, T, 2, 2) if interleaved else None
    a, b = (pairs[..., 0], pairs[..., 1]) if interleaved else (x[..., :2], x[..., 2:4])
    turned = (a + 1j * b) * np.exp(1j * angle[places])[:, None]
    parts = [turned.real, turned.imag]
    flat = np.stack(parts, -1).reshape(B, H, T, 4) if interleaved else np.concatenate(parts, -1)
    np.testing.assert_allclose(got, np.concatenate([flat, x[..., 4:]], -1), rtol=1e-5, atol=1e-6)


def test_rms_normalization_equals_onnxruntime():
    x, scale = normal(2, 3, 4), normal(3, 4)
    same("RMSNormalization", [x, scale], opset=23, axis=1, epsilon=0.1)


@pytest.mark.parametrize("rule", ["linear", "gated", "delta", "gated_delta"])
def test_linear_attention_is_its_recurrence(rule):
    q, k, v = normal(B, T, H * D), normal(B, T, K * D), normal(B, T, K * 3)
    state, decay, beta = normal(B, K, D, 3), -np.abs(normal(B, T, K)), np.abs(normal(B, T, K))
    decay, beta = decay if "gated" in rule else None, beta if "delta" in rule else None
    inputs = [q, k, v, state, decay, beta]
    model = one_op(
        "LinearAttention",
        inputs,
        [np.float32] * 2,
        27,
        q_num_heads=H,
        kv_num_heads=K,
        update_rule=rule,
        scale=0.5,
    )
    got, last = in_importer(model, inputs)
    memory, expected = state.astype(np.float64), np.zeros((B, T, H, 3))
    for b, t, j in np.ndindex(B, T, K):
        key, value = k[b, t].reshape(K, D)[j], v[b, t].reshape(K, 3)[j]
        if decay is not None:
            memory[b, j] *= np.exp(decay[b, t, j])
        if beta is not None:
            value = beta[b, t, j] * (value - memory[b, j].T @ key)
        memory[b, j] += np.outer(key, value)
        for h in range(j * H // K, (j + 1) * H // K):
            expected[b, t, h] = 0.5 * q[b, t].reshape(H, D)[h] @ memory[b, j]
    np.testing.assert_allclose(got, expected.reshape(B, T, -1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(last, memory, rtol=1e-4, atol=1e-5)


def test_causal_convolution_in_pieces_is_that_of_the_whole():
    x, w, bias = normal(B, 3, 7), normal(3, 1, 4), normal(3)
    expected = np.zeros(x.shape)
    for t, i in np.ndindex(7, 4):
        if t - 3 + i >= 0:
            expected[..., t] += x[..., t - 3 + i] * w[:, 0, i]
    expected += bias[:, None]
    pieces, state = [], None
    for part in (x[..., :2], x[..., 2:]):
        model = one_op("CausalConvWithState", [part, w, bias, state], [np.float32] * 2, 27)
        y, state = (np.asarray(y) for y in in_importer(model, [part, w, bias, state]))
        pieces.append(y)
    np.testing.assert_allclose(np.concatenate(pieces, -1), expected, rtol=1e-5, atol=1e-5)
