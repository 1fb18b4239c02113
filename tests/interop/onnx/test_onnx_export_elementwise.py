"""Arithmetic, comparisons, special functions and bits: exported, run, imported again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exported import ops, same
from jax import lax

LINE = jnp.linspace(-6.2, 6.1, 43)
# Functions of one real number that ONNX has, and those written by several operations.
SMOOTH = ("abs neg sign floor ceil exp exp2 expm1 tanh logistic sin cos tan sinh cosh asinh atan "
          "cbrt erf erfc square is_finite lgamma round")  # fmt: skip
POSITIVE = "log log1p sqrt rsqrt"
INSIDE = "asin acos atanh erf_inv"


def test_functions_of_one_number() -> None:
    def everything(x, positive, inside):
        smooth = [getattr(lax, name)(x) for name in SMOOTH.split()]
        above = [getattr(lax, name)(positive) for name in POSITIVE.split()]
        within = [getattr(lax, name)(inside) for name in INSIDE.split()]
        even = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
        powers = [lax.integer_pow(x, n) for n in (-3, -1, 0, 1, 2, 5, 7)]
        return smooth, above, within, jnp.arccosh(1 + positive), even, powers

    same(everything, LINE, jnp.linspace(1e-6, 9, 33), jnp.linspace(-0.999, 0.999, 33))


@pytest.mark.parametrize("name", ["expm1", "log1p"])
def test_near_zero_no_digit_is_lost(name: str) -> None:
    # By exp(x) - 1 and log(1 + x) every one of these would be off by more than a tenth.
    x = jnp.array([1e-8, -3e-8, 2e-7, 1e-10], jnp.float32)
    same(getattr(jnp, name), x, tolerance=3e-7)


def test_edges_of_the_inverse_error_function() -> None:
    same(lax.erf_inv, jnp.array([-1.0, 1.0, 0.9999999, 0.0, 1e-7]))
    same(lax.erfc, jnp.array([9.0, 5.0, -9.0]), tolerance=3e-6)


def test_operations_of_two_numbers() -> None:
    def everything(x, y):
        tests = [x == y, x != y, x < y, x <= y, x > y, x >= y]
        sums = [x + y, x - y, x * y, x / y, lax.rem(x, y), jnp.maximum(x, y), jnp.minimum(x, y)]
        others = [
            jnp.abs(x) ** y,
            jnp.arctan2(x, y),
            lax.clamp(-1.0, x, 2.0),
            jnp.where(x < y, x, y),
        ]
        return tests, sums, others

    same(everything, LINE, LINE[::-1] * 0.7)


def test_nan_goes_through_maxima_as_in_jax() -> None:
    x = jnp.array([jnp.nan, 1.0, -jnp.inf])
    same(
        lambda x, y: (jnp.maximum(x, y), jnp.minimum(x, y), jnp.isnan(x), jnp.isfinite(x)),
        x,
        x[::-1],
    )


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8", "uint16", "uint32"])
def test_integers_of_every_width(dtype: str) -> None:
    def everything(a, b):
        sums = [a + b, a - b, a * b, lax.div(a, b), lax.rem(a, b), a // b, a % b]
        bits = [a & b, a | b, a ^ b, ~a, lax.population_count(a), lax.clz(a)]
        shifts = [a << 2, a >> 1, lax.shift_right_logical(a, jnp.full_like(a, 3)), a << (b % 8)]
        rest = [
            jnp.maximum(a, b),
            jnp.minimum(a, b),
            jnp.sign(a),
            a < b,
            a >= b,
            jnp.where(a < b, a, b),
        ]
        return sums, bits, shifts, rest

    info = jnp.iinfo(dtype)
    a = jnp.array([info.max, info.max - 3, 7, 100, info.min + (info.min < 0)], dtype)
    b = jnp.array([2, 3, 7, 5, 9], dtype)
    same(everything, a, b)


def test_division_by_zero_ends_no_process() -> None:
    a, zero = jnp.array([-7, 8, 0]), jnp.zeros(3, jnp.int32)
    same(lambda a, b: (lax.div(a, b), lax.rem(a, b), jnp.where(b == 0, 0, a // b)), a, zero)


def test_booleans() -> None:
    def everything(a, b):
        logic = [
            a & b,
            a | b,
            a ^ b,
            ~a,
            a == b,
            a != b,
            a < b,
            jnp.maximum(a, b),
            jnp.minimum(a, b),
        ]
        return (
            logic,
            jnp.where(a, a, b),
            a.any(),
            a.all(),
            a.sum(),
            lax.reduce_xor(a, (0,)),
            jnp.sort(a),
        )

    same(everything, jnp.array([True, False, True]), jnp.array([True, True, False]))


def test_casts_and_reduced_precision() -> None:
    def everything(x):
        casts = [x.astype(d) for d in ("int8", "int32", "bool", "float16", "bfloat16", "uint8")]
        return casts, [lax.reduce_precision(x, *bits) for bits in ((8, 7), (5, 10), (8, 23))]

    same(everything, jnp.linspace(0, 100, 37))


def test_bits_become_floats_exactly() -> None:
    """Below opset 26, which has BitCast, by arithmetic: every kind of number, every exponent."""
    exponents = np.arange(40, 256, dtype=np.uint32) << 23
    bits = np.concatenate([exponents, exponents | (1 << 31) | 0x6AAAAA, exponents | 0x7FFFFF])
    bits = np.concatenate([bits, np.array([0, 1 << 31], np.uint32)])
    same(lambda x: lax.bitcast_convert_type(x, jnp.float32), bits, tolerance=0.0)


def test_bitcast_from_opset_26() -> None:
    x = jnp.array([1.5, -0.0, 3e38])
    both = same(lambda x: lax.bitcast_convert_type(x, jnp.int32), x, opset=26, importer=False)
    assert ops(both) == ["BitCast"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_computed_wide_and_rounded(dtype: str) -> None:
    def everything(x, y):
        return (
            x + y,
            x * y,
            jnp.exp(x),
            jnp.tanh(y),
            jnp.where(x < y, x, y),
            jnp.maximum(x, y),
            x.sum(),
        )

    # One unit in the last place of bfloat16 is 2 ** -8.
    tolerance = 2**-8 if dtype == "bfloat16" else 2**-11
    same(everything, LINE.astype(dtype), LINE[::-1].astype(dtype), tolerance=tolerance)


def test_nothing_is_expanded_that_broadcasts_anyway() -> None:
    model = same(lambda x, b: jnp.tanh(x + b) * 2.0, jnp.ones((3, 4)), jnp.ones((1, 4)))
    assert ops(model) == ["Add", "Tanh", "Mul"]


def test_equal_operations_are_written_once() -> None:
    model = same(lambda x: jnp.exp(x) + jnp.exp(x), LINE)
    assert ops(model) == ["Exp", "Add"]


@pytest.mark.parametrize("opset", [18, 20, 22, 24, 25])
def test_every_opset_is_valid(opset: int) -> None:
    def everything(x, i, b):
        return (
            jnp.tanh(x) + x.max(0, keepdims=True),
            i % 3,
            b.any(),
            x.T @ x,
            x[:, ::2],
            jnp.sort(x),
        )

    args = jnp.ones((3, 4)), jnp.arange(5), jnp.array([True, False])
    model = same(everything, *args, opset=opset, importer=opset in (18, 22))
    assert [entry.version for entry in model.opset_import] == [opset]


def test_jit_is_transparent() -> None:
    inner = jax.jit(lambda x: jnp.sin(x) + 1)
    assert ops(same(lambda x: inner(x) * 2, LINE)) == ["Sin", "Add", "Mul"]
