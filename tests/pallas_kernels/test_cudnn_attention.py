"""cuDNN's attention: what is handed to JAX means what ours means, and reaches the CUDA program.

No machine here has cuDNN or a GPU. JAX's own form of the same function (``implementation="xla"``)
stands in for the library's numbers, and a version number for its installation.
"""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from kernel_cases import TOLERANCE, cudnn_calls, custom_calls, distance, double

from fnml.pallas_kernels import attention, rms_norm

B, T, H, K, D = 2, 24, 4, 2, 16


@pytest.fixture
def installed(monkeypatch):
    """Let JAX find a cuDNN; the number is all that it asks the library for while tracing."""
    version = SimpleNamespace(cudnn_get_version=lambda: 91_100)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", version)


@pytest.fixture
def stand_in(monkeypatch):
    """Compute by XLA whatever goes to cuDNN."""
    theirs = jax.nn.dot_product_attention

    def by_xla(*arrays, implementation, **options):
        assert implementation == "cudnn"
        return theirs(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    # That form, unlike cuDNN's, promotes dtypes and ranks as it goes.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def draw(S=T):
    rng = np.random.default_rng(0)
    shapes = ((B, T, H, D), (B, S, K, D), (B, S, K, D), (B, T, H, D))
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)


def value_and_grads(implementation, **options):
    def run(q, k, v, grad, bias=None):
        def call(q, k, v, bias):
            return attention(q, k, v, bias=bias, implementation=implementation, **options)

        out, back = jax.vjp(call, q, k, v, bias)
        return out, back(grad.astype(out.dtype))

    return run


MEANINGS = {
    "full": ({}, T),
    "causal, more keys": ({"causal": True, "scale": 0.4}, T + 6),
    "causal, fewer keys": ({"causal": True}, T - 6),
    "one side of a window": ({"window": (5, 0)}, T),
    "causal window": ({"causal": True, "window": 7}, T),
    "lengths, one of them 0": ({"lengths": jnp.asarray([17, 0])}, T),
    "causal, lengths beyond the end": ({"causal": True, "lengths": jnp.asarray([5, 99])}, T),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_the_arguments_mean_what_ours_mean(name, stand_in):
    options, S = MEANINGS[name]
    want = double(value_and_grads("reference", **options), *draw(S))
    got = jax.jit(value_and_grads("cudnn", **options))(*draw(S))
    assert got[0].dtype == jnp.bfloat16
    assert distance(got, want) < TOLERANCE["bfloat16"]


def test_a_bias_and_its_gradient_mean_what_ours_mean(stand_in):
    bias = jnp.asarray(np.random.default_rng(1).normal(size=(1, H, T, T)), jnp.bfloat16)
    arrays = (*draw(), bias)
    want = double(value_and_grads("reference", causal=True), *arrays)
    got = jax.jit(value_and_grads("cudnn", causal=True))(*arrays)
    assert got[1][3].shape == bias.shape
    assert distance(got, want) < TOLERANCE["bfloat16"]


def loss_of(*names, **options):
    """Return a function of q, k, v and the named arrays."""

    def loss(q, k, v, *rest):
        arrays = dict(zip(names, rest, strict=True))
        out = attention(q, k, v, **options, **arrays, implementation="cudnn")
        return out.astype(jnp.float32).sum()

    return loss


def program(function, *arrays):
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def shapes(D=64, dtype=jnp.bfloat16):
    q, k = (jax.ShapeDtypeStruct((B, 256, heads, D), dtype) for heads in (H, K))
    return q, k, k


@pytest.mark.parametrize("gradient", [False, True])
def test_a_cpu_lowers_the_librarys_kernels_for_cuda_and_for_nothing_else(installed, gradient):
    loss = loss_of(causal=True, window=100)
    function = jax.grad(loss, (0, 1, 2)) if gradient else loss
    calls = custom_calls(function, shapes(), "cuda")["cuda"]
    assert cudnn_calls(calls) == 1 + gradient
    text = program(function, *shapes())
    # The library's window counts the query's own key; ours is beside it.
    assert set(re.findall(r"window_length\\22: (\d+)", text)) == {"101"}
    assert set(re.findall(r"mask_type\\22: \\22(\w+)", text)) == {"CAUSAL"}
    with pytest.raises(NotImplementedError, match="not found for platform"):
        custom_calls(function, shapes(), "tpu")


def test_lengths_and_a_bias_reach_the_kernel(installed):
    text = program(loss_of("lengths"), *shapes(), jax.ShapeDtypeStruct((B,), jnp.int32))
    assert set(re.findall(r"mask_type\\22: \\22(\w+)", text)) == {"PADDING"}
    bias = jax.ShapeDtypeStruct((1, H, 256, 256), jnp.bfloat16)
    calls = custom_calls(loss_of("bias"), (*shapes(), bias), "cuda")["cuda"]
    assert calls["__cudnn$fmhaScaleBiasSoftmax"] == 1


REFUSED = {
    "dtype": ({"dtype": jnp.float32}, {}, r"dtype float32 \(it takes float16 and bfloat16\)"),
    "width": ({"D": 20}, {}, r"head width 20 \(it takes multiples of 8"),
    "an old GPU's width": ({"D": 256}, {}, r"head dim must be <= 128"),
    "right": ({}, {"window": 3}, "window to the right"),
    "left": ({}, {"window": (3, 10_000)}, "window to the right"),
    "no key": ({}, {"causal": True, "window": 3, "lengths": jnp.ones(B, jnp.int32)}, "may leave"),
    "bias": ({}, {"bias": jnp.zeros((1, 1, 256, 1))}, r"bias float32 \(1, 1, 256, 1\) \(it takes b"),
    "segments": ({}, {"segment_ids": jnp.zeros((B, 256), jnp.int32)}, "segment_ids"),
    "dropout": ({}, {"dropout": 0.1, "key": jax.random.key(0)}, "dropout"),
    "mask": ({}, {"mask": jnp.ones((1, 1, 256, 256), bool)}, "mask"),
    "cap": ({}, {"soft_cap": 30.0}, "soft_cap"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_do_is_refused_by_name(installed, name):
    described, options, message = REFUSED[name]
    with pytest.raises(NotImplementedError, match=f"cudnn: .*{message}.* can do it: .*lax"):
        jax.eval_shape(
            lambda q, k, v: attention(q, k, v, **options, implementation="cudnn"),
            *shapes(**described),
        )


def test_where_it_is_not_installed_the_refusal_is_what_jax_says(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", None)
    with pytest.raises(
        NotImplementedError, match=r"cudnn: cuDNN is not detected\). These can do it"
    ):
        attention(*draw()[:3], implementation="cudnn")


def test_auto_leaves_it_alone(installed):
    # A window at this width is beyond the Pallas body, and cuDNN could do it.
    q = jax.ShapeDtypeStruct((1, 512, 2, 128), jnp.bfloat16)

    def calls(implementation):
        def run(q):
            return attention(q, q, q, causal=True, window=9, implementation=implementation)

        return cudnn_calls(custom_calls(run, (q,), "cuda")["cuda"])

    assert (calls("auto"), calls("cudnn")) == (0, 1)


def test_a_kernel_without_such_a_body_says_so():
    with pytest.raises(NotImplementedError, match=r"\(cudnn: no such body\)"):
        rms_norm(jnp.ones((2, 128)), jnp.ones(128), implementation="cudnn")
