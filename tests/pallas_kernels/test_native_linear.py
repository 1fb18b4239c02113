"""The linear layer in C++: value and gradients, which calls it takes, one result for any threads."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_builds import scope, tiles_anyhow, with_tiles

from fnml.models import linear, linears
from fnml.pallas_kernels import build_native, native_faults, native_kernels
from fnml.pallas_kernels.native import (
    faults_of,
    linear_forward,
    linear_input_gradient,
    linear_kernel_gradient,
)

pytestmark = pytest.mark.skipif(bool(native_faults()), reason="; ".join(native_faults()))

EPSILON = float(np.finfo(np.float32).eps)
TAKEN = "fnml_linear_forward"


def arrays(N, D, F, seed=0):
    """Return x, the kernel, the bias and a gradient of the result, in float64."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in [(N, D), (D, F), (F,), (N, F)]]


def floats(*given_arrays):
    return [jnp.asarray(x, jnp.float32) for x in given_arrays]


def products(x, kernel, bias, grad, *, tiles=True, library=None):
    """Run the three C++ products, whatever their sizes."""
    with native_kernels(library, tiles=tiles) if library else scope(tiles):
        (out,) = linear_forward(x, [kernel], [bias])
        (grad_kernel,), (grad_bias,) = linear_kernel_gradient(x, [grad], biased=[True])
        return out, linear_input_gradient([kernel], [grad]), grad_kernel, grad_bias


def bounds(x, kernel, bias, grad):
    """Return the exact results, and how far float32 sums may be from them.

    A sum of n products has a relative error of at most n roundings against the sum of their
    absolute values, in any order, and one for each operand's own rounding.
    """
    size = [np.abs(a) for a in (x, kernel, bias, grad)]

    def of(x, kernel, bias, grad):
        return x @ kernel + bias, grad @ kernel.T, x.T @ grad, grad.sum(0)

    lengths = (x.shape[1] + 1, kernel.shape[1], x.shape[0], x.shape[0])
    sums = of(*size)
    far = [(n + 2) * EPSILON * total for n, total in zip(lengths, sums, strict=True)]
    return of(x, kernel, bias, grad), far


# Below and above a vector, a panel, a tile, a block and what one thread takes.
sizes = st.one_of(
    st.integers(1, 70), st.sampled_from([96, 127, 128, 129, 255, 400, 513]), st.integers(500, 540)
)


@settings(max_examples=25, deadline=None)
@given(N=sizes, D=sizes, F=sizes, seed=st.integers(0, 3), tiles=st.booleans())
def test_every_entry_is_within_the_bound_of_its_sum(N, D, F, seed, tiles):
    x, kernel, bias, grad = arrays(N, D, F, seed)
    found = products(*floats(x, kernel, bias, grad), tiles=tiles)
    for value, exact, far in zip(found, *bounds(x, kernel, bias, grad), strict=True):
        assert value.shape == exact.shape
        assert (np.abs(np.asarray(value, np.float64) - exact) <= far).all()


@pytest.mark.parametrize("tiles", [True, False])
def test_long_and_wide_products_keep_their_precision(tiles):
    # Several blocks of C, of its rows and of the depth. A random walk of n roundings stays far
    # below n of them: measured 4e-7 relative to the norm.
    x, kernel, bias, grad = arrays(1030, 1100, 530)
    exact, _ = bounds(x, kernel, bias, grad)
    found = products(*floats(x, kernel, bias, grad), tiles=tiles)
    for value, wanted in zip(found, exact, strict=True):
        assert np.linalg.norm(value - wanted) < 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("lead", [(2, 80), (160,)])
def test_the_layer_is_differentiated_as_outside_the_scope(lead, biased):
    x, kernel, bias, grad = floats(*arrays(160, 72, 88))
    x, grad = x.reshape(*lead, 72), grad.reshape(*lead, 88)

    def both(x, kernel, bias):
        out, back = jax.vjp(linear, x, kernel, bias)
        return out, *back(grad)

    given_bias = bias if biased else None
    outside = jax.jit(both)(x, kernel, given_bias)
    with native_kernels():
        assert TAKEN in jax.jit(both).lower(x, kernel, given_bias).as_text()
        inside = jax.jit(both)(x, kernel, given_bias)
    assert jax.tree.structure(inside) == jax.tree.structure(outside)
    for value, expected in zip(jax.tree.leaves(inside), jax.tree.leaves(outside), strict=True):
        distance = np.linalg.norm(value - expected) / np.linalg.norm(expected)
        assert distance < 1e-6  # sums of up to 160 products


def layers(widths, biased=True, rows=200, seed=0):
    """Return x [rows, 96], and for each width a kernel, a bias and a gradient of the result."""
    x = np.random.default_rng(seed).normal(size=(rows, 96))
    each = [arrays(rows, 96, F, seed + 1 + i)[1:] for i, F in enumerate(widths)]
    kernels, biases, grads = ([floats(a)[0] for a in kind] for kind in zip(*each, strict=True))
    return floats(x)[0], kernels, biases if biased else None, tuple(grads)


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("biased", [True, False])
# Widths that blocks of columns end with, and some that they do not; rows that few threads share.
@pytest.mark.parametrize("widths", [(64, 64, 64), (160, 96), (72, 100), (544, 640), (16, 96)])
@pytest.mark.parametrize("rows", [200, 1200])
def test_layers_of_the_same_rows_have_their_own_results(rows, widths, biased, tiles):
    x, kernels, biases, grads = layers(widths, biased, rows)

    def together(x, kernels, biases):
        out, back = jax.vjp(linears, x, kernels, biases)
        return out, back(grads)

    with scope(tiles):
        lowered = jax.jit(together).lower(x, kernels, biases).as_text()
        assert lowered.count("@fnml_linear_forward") <= 1 < len(widths)
        out, (grad_x, grad_kernels, grad_biases) = jax.jit(together)(x, kernels, biases)
        for i, kernel in enumerate(kernels):
            bias = biases[i] if biased else None
            alone, back = jax.vjp(linear, x, kernel, bias)
            _, alone_kernel, alone_bias = back(grads[i])
            np.testing.assert_array_equal(out[i], alone)
            np.testing.assert_allclose(grad_kernels[i], alone_kernel, rtol=0, atol=5e-4)
            if biased:
                np.testing.assert_allclose(grad_biases[i], alone_bias, rtol=0, atol=5e-4)
    exact = sum(
        np.asarray(grad, np.float64) @ np.asarray(kernel, np.float64).T
        for grad, kernel in zip(grads, kernels, strict=True)
    )
    # Sums of up to 1184 products; measured 3e-7.
    assert np.linalg.norm(grad_x - exact) < 1e-6 * np.linalg.norm(exact)


def test_layers_that_are_not_all_taken_run_one_by_one():
    x, kernels, biases, _ = layers((64, 1))
    with native_kernels():
        text = str(jax.make_jaxpr(linears)(x, kernels, biases))
        one_by_one = str(
            jax.make_jaxpr(lambda x, w, b: tuple(map(lambda w, b: linear(x, w, b), w, b)))(
                x, kernels, biases
            )
        )
    assert text == one_by_one
    assert "ffi_call" in text


@pytest.mark.parametrize("odd", [np.inf, np.nan])
@pytest.mark.parametrize("where", [0, 2])
def test_layers_with_numbers_that_tiles_cannot_hold(where, odd):
    x, kernels, _, grads = layers((64, 96, 128))
    grads = tuple(g.at[3, 5].set(odd) if i == where else g for i, g in enumerate(grads))
    found = []
    for tiles in (True, False):
        with native_kernels(with_tiles(), tiles=tiles):
            found.append(linear_input_gradient(kernels, grads))
            found.append(linear_kernel_gradient(x, grads, biased=[False] * 3)[0])
    np.testing.assert_array_equal(found[0], found[2])
    jax.tree.map(np.testing.assert_array_equal, found[1], found[3])
    assert not np.isfinite(found[0][3]).all() and np.isfinite(found[0][4]).all()


def test_second_derivatives_are_those_outside():
    x, kernel, bias, _ = floats(*arrays(128, 64, 64))

    def penalty(kernel, bias):
        slope = jax.grad(lambda x: (linear(x, kernel, bias) ** 2).sum())(x)
        return (slope**2).sum()

    expected = jax.grad(penalty, argnums=(0, 1))(kernel, bias)
    with native_kernels():
        found = jax.grad(penalty, argnums=(0, 1))(kernel, bias)
    for value, other in zip(found, expected, strict=True):
        assert np.linalg.norm(value - other) < 3e-6 * np.linalg.norm(other)


def test_nothing_changes_outside_the_scope():
    x, kernel, bias, _ = floats(*arrays(128, 64, 64))

    def program():
        return str(
            jax.make_jaxpr(jax.grad(lambda *a: linear(*a).sum(), (0, 1, 2)))(x, kernel, bias)
        )

    before = program()
    with native_kernels():
        inside = program()
    assert program() == before != inside
    assert "ffi_call" not in before
    assert "ffi_call" in inside


def test_other_platforms_keep_their_form():
    x, kernel, _, _ = floats(*arrays(128, 64, 64))
    with native_kernels():
        traced = jax.jit(lambda *a: linear(*a)).trace(x, kernel)
        assert TAKEN in traced.lower().as_text()
        for platform in ("tpu", "cuda", "rocm"):
            assert "fnml_linear" not in traced.lower(lowering_platforms=(platform,)).as_text()


def test_vmap_has_the_bits_of_the_form_outside():
    x, kernel, bias, grad = floats(*arrays(256, 64, 64))
    x, grad = x.reshape(2, 128, 64), grad.reshape(2, 128, 64)

    def one(x, grad, kernel):
        out, back = jax.vjp(linear, x, kernel, bias)
        return out, back(grad)

    # Without jit, so that no fusion chooses another order of sums.
    outside = jax.vmap(one, in_axes=(0, 0, None))(x, grad, kernel)
    with native_kernels():
        inside = jax.vmap(one, in_axes=(0, 0, None))(x, grad, kernel)
    for value, expected in zip(jax.tree.leaves(inside), jax.tree.leaves(outside), strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize(
    ("rows", "inner", "columns", "dtype", "out_dtype"),
    [
        (63, 64, 64, "float32", None),
        (128, 63, 64, "float32", None),
        (128, 64, 1, "float32", None),
        (128, 512, 513, "float32", None),
        (128, 64, 64, "bfloat16", None),
        (128, 64, 64, "bfloat16", "float32"),
        (128, 64, 64, "float32", "bfloat16"),
    ],
)
def test_other_sizes_and_dtypes_keep_their_form(rows, inner, columns, dtype, out_dtype):
    x, kernel = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), jnp.float32)
    plain = str(jax.make_jaxpr(lambda *a: linear(*a, out_dtype=out_dtype))(x, kernel))
    # Without tiles, which take kernels of any size.
    with native_kernels(tiles=False):
        inside = str(jax.make_jaxpr(lambda *a: linear(*a, out_dtype=out_dtype))(x, kernel))
    assert inside == plain


@pytest.mark.parametrize("columns", [2, 10, 63])
def test_narrow_kernels_run_in_cpp(columns):
    x, kernel = jnp.ones((64, 64)), jnp.ones((64, columns))
    with native_kernels(tiles=False):
        assert TAKEN in jax.jit(lambda *a: linear(*a)).lower(x, kernel).as_text()


@pytest.mark.parametrize("columns", [2, 10, 31])
def test_what_lies_beyond_a_narrow_row_does_not_count(columns):
    # Vectors reach into the next row, whose numbers here would spoil every sum.
    x, kernel, bias, grad = floats(*arrays(70, 72, columns))
    clean = products(x, kernel, bias, grad)
    spoilt = products(x, kernel.at[1:, 0].set(jnp.nan), bias, grad.at[1:, 0].set(jnp.nan))
    np.testing.assert_array_equal(spoilt[0][:, 1:], clean[0][:, 1:])
    for value, expected in zip(spoilt[2:], clean[2:], strict=True):
        np.testing.assert_array_equal(value[..., 1:], expected[..., 1:])


@pytest.mark.parametrize("depth", [1024, 2048])
def test_rows_that_meet_in_the_cache_give_the_bits_of_those_read_in_place(depth):
    # They are copied where more than one panel of 32 columns passes over them: 640 leave each of
    # eight threads 80.
    x, kernel, bias, grad = floats(*arrays(70, depth, 640))
    whole = products(x, kernel, bias, grad, tiles=False)[0]
    panel = products(x, kernel[:, :32], bias[:32], grad[:, :32], tiles=False)[0]
    np.testing.assert_array_equal(whole[:, :32], panel)
    x, kernel, bias, grad = floats(*arrays(70, 640, depth))
    whole = products(x, kernel, bias, grad, tiles=False)[1]
    panel = products(x[:, :32], kernel[:32], bias, grad, tiles=False)[1]
    np.testing.assert_array_equal(whole[:, :32], panel)


on_tiles = pytest.mark.skipif(
    bool(native_faults()) or not tiles_anyhow(),
    reason="this processor has no vectors of 16 to emulate tiles with",
)


@on_tiles
def test_tiles_lose_no_digit_to_vectors():
    # 32 numbers are added up apart before they join the sum, so rounding adds up to less; and of
    # any two thirds of the parts' products alone the error would be 60 times as large.
    x, kernel, bias, grad = arrays(512, 768, 256)
    exact, _ = bounds(x, kernel, bias, grad)
    given_arrays = floats(x, kernel, bias, grad)
    on, off = products(*given_arrays), products(*given_arrays, tiles=False)
    for tiled, plain, wanted in zip(on[:3], off[:3], exact[:3], strict=True):
        assert not np.array_equal(tiled, plain)
        assert np.linalg.norm(tiled - wanted) <= 1.5 * np.linalg.norm(plain - wanted)


@on_tiles
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiles_keep_small_and_large_numbers(scale):
    x, kernel, bias, grad = arrays(64, 96, 64)
    given_arrays = floats(scale * x, kernel, scale * bias, scale * grad)
    found = products(*given_arrays)[:2]
    exact = x @ kernel + bias, grad @ kernel.T
    for value, wanted in zip(found, exact, strict=True):
        distance = np.linalg.norm(np.asarray(value, np.float64) / scale - wanted)
        assert distance < 1e-6 * np.linalg.norm(wanted)


@on_tiles
@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan, np.finfo(np.float32).max])
@pytest.mark.parametrize("where", ["x", "kernel", "grad"])
def test_numbers_that_tiles_cannot_hold_are_multiplied_without(odd, where):
    given_arrays = dict(zip(("x", "kernel", "bias", "grad"), arrays(70, 80, 90), strict=True))
    given_arrays[where][-1, -1] = odd
    changed = floats(*given_arrays.values())
    on, off = (products(*changed, tiles=tiles, library=with_tiles()) for tiles in (True, False))
    touched = {"x": (0, 2), "kernel": (0, 1), "grad": (1, 2)}[where]
    for i in touched:
        np.testing.assert_array_equal(on[i], off[i])


@on_tiles
def test_large_kernels_are_taken_with_tiles_only():
    x, kernel = jnp.ones((128, 512)), jnp.ones((512, 513))
    for tiles in (True, False):
        with scope(tiles):
            assert (TAKEN in jax.jit(lambda *a: linear(*a)).lower(x, kernel).as_text()) == tiles


def test_faults_are_named():
    assert faults_of(x=jnp.ones((0, 3)), kernel=jnp.ones((3, 4), jnp.int32)) == [
        "x is (0, 3), expected some numbers, known how many",
        "kernel is int32, expected float32",
    ]


def digest():
    """Return a hash of all three products at sizes that threads share."""
    total = hashlib.sha256()
    for N, D, F in [(700, 96, 176), (150, 70, 260), (1100, 70, 90)]:
        for value in products(*floats(*arrays(N, D, F)), library=build_native()):
            total.update(np.asarray(value).tobytes())
    return total.hexdigest()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="CPUs cannot be chosen here")
def test_the_bits_are_the_same_for_any_number_of_threads():
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("one CPU only")
    here = Path(__file__)
    code = (
        f"import os, sys; os.sched_setaffinity(0, {cpus[:1]})\n"
        f"sys.path.insert(0, {str(here.parent)!r})\n"
        f"import {here.stem}; print({here.stem}.digest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    )
    assert done.stdout.strip() == digest()
