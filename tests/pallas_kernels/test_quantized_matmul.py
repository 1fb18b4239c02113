import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_cases import TOLERANCE, distance, races, strict_cuda, strict_tpu

from fnml.core import Model, Param, init
from fnml.pallas_kernels import quantized_matmul
from fnml.pallas_kernels.quantized_matmul._blocks import cuda_tiles
from fnml.pallas_kernels.quantized_matmul._packed import Layout
from fnml.transforms import adapt, merge, quantize

BODIES = {
    "reference": {"implementation": "reference"},
    "lax": {"implementation": "lax"},
    "tpu": {"implementation": "pallas", "interpret": "tpu"},
}


def _draw(M, K, N, bits, groups, zero, seed=0, dtype="float32"):
    """Return x, codes, scale, zero, the gradient, and the matrix in float64."""
    random = np.random.default_rng(seed)
    low, high = (0, 2**bits) if zero else (1 - 2 ** (bits - 1), 2 ** (bits - 1))
    whole = random.integers(low, high, (K, N))
    scale = (random.random((groups, N)) + 0.1).astype(np.float32)
    zeros = random.integers(0, 2**bits, (groups, N)) if zero else np.zeros((groups, N), int)
    each = K // groups
    matrix = (whole - np.repeat(zeros, each, 0)) * np.repeat(scale, each, 0).astype(np.float64)
    if bits == 8:
        codes = whole.astype(np.uint8 if zero else np.int8)
    else:
        rows = np.pad(whole + (0 if zero else 8), ((0, K % 2), (0, 0)))
        codes = (rows[: len(rows) // 2] | rows[len(rows) // 2 :] << 4).astype(np.uint8)
    x, grad = (jnp.asarray(random.normal(size=(M, size)), dtype) for size in (K, N))
    return x, jnp.asarray(codes), jnp.asarray(scale), _uint8(zeros) if zero else None, grad, matrix


def _uint8(x):
    return jnp.asarray(x, jnp.uint8)


def _distances(x, codes, scale, zero, grad, matrix, **options):
    @jax.jit
    def run(x, codes, scale, zero, grad):
        out, vjp = jax.vjp(lambda x: quantized_matmul(x, codes, scale, zero, **options), x)
        return out, vjp(grad)[0]

    out, grad_x = run(x, codes, scale, zero, grad)
    assert out.dtype == grad_x.dtype == x.dtype
    x, grad = (np.asarray(a).astype(np.float64) for a in (x, grad))
    return distance(out, x @ matrix), distance(grad_x, grad @ matrix.T)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_products_and_gradients_equal_float64(body, bits, zero, groups):
    arrays = _draw(5, 512, 128, bits, groups, zero)
    assert max(_distances(*arrays, bits=bits, **BODIES[body])) < TOLERANCE["float32"]


@pytest.mark.parametrize("body", BODIES)
def test_bfloat16(body):
    arrays = _draw(3, 256, 128, 4, 2, False, dtype="bfloat16")
    assert max(_distances(*arrays, bits=4, **BODIES[body])) < TOLERANCE["bfloat16"]


@settings(max_examples=8)
@example(3, 1, 4, False)  # the row that pads an odd number lies beyond the last group
@given(
    groups=st.integers(1, 4),
    each=st.integers(1, 9),
    bits=st.sampled_from([8, 4]),
    zero=st.booleans(),
)
def test_odd_shapes_with_groups_across_the_halves(groups, each, bits, zero):
    # An odd number of rows, and groups that begin in one nibble and end in the other.
    arrays = _draw(2, groups * each, 3, bits, groups, zero)
    assert max(_distances(*arrays, bits=bits)) < 5e-6


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_of_rows_keep_memory_small(bits):
    arrays = _draw(2, 2048, 2048, bits, 16, False)
    assert max(_distances(*arrays, bits=bits)) < 5e-6

    def temporary(**options):
        call = jax.jit(lambda *a: quantized_matmul(*a, bits=bits, **options))
        return call.lower(*arrays[:3]).compile().memory_analysis().temp_size_in_bytes

    # 2 MiB a block, two blocks at once for 4 bits; the whole matrix as floats is 16 MiB.
    assert temporary() < 6 * 2**20 < 15 * 2**20 < temporary(implementation="reference")


@pytest.mark.parametrize("bits", [8, 4])
def test_no_races_and_no_reads_out_of_bounds(bits):
    arrays = _draw(3, 256, 128, bits, 2, True)
    options = {"implementation": "pallas", "interpret": strict_tpu()}
    assert max(_distances(*arrays, bits=bits, **options)) < TOLERANCE["float32"]
    assert not races()


@pytest.mark.parametrize(
    ("M", "K", "N", "bits", "groups", "zero", "dtype"),
    [
        (1, 256, 32, 8, 1, False, "float32"),  # one batch of rows for four warpgroups
        (2, 640, 32, 8, 5, True, "bfloat16"),  # five: one warpgroup takes two
        (3, 256, 64, 4, 4, False, "float16"),  # two blocks of columns
        (1, 512, 32, 4, 16, True, "float32"),  # eight groups in a batch
    ],
)
def test_the_gpu_body_without_races(M, K, N, bits, groups, zero, dtype):
    arrays = _draw(M, K, N, bits, groups, zero, dtype=dtype)
    options = {"implementation": "pallas", "interpret": strict_cuda()}
    assert max(_distances(*arrays, bits=bits, **options)) < TOLERANCE[dtype]
    assert not races("cuda")


def test_a_gpu_gets_columns_for_as_many_cores_as_it_can():
    for outputs in (128, 4096, 8192, 11008, 14336, 28672):
        tiles = cuda_tiles(Layout(8, 4096, 128), 1, outputs)
        # Every multiprocessor of 132 has the same number of blocks, but for a fifth of them.
        rounds = outputs / tiles.n / 132
        assert rounds < 1 or rounds / np.ceil(rounds) > 0.8
    assert cuda_tiles(Layout(4, 4096, 1365), 1, 4096) is None


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_it_reads_what_quantize_stores(bits, zero_point):
    spec = {"w": Param((30, 7), ("embed", "mlp"), jax.nn.initializers.normal())}
    model = quantize(
        Model(spec, lambda params, x: x @ params["w"]), bits, group=10, zero_point=zero_point
    )
    params = adapt(model, init(spec, jax.random.key(0)))
    stored, x = params["w"], jax.random.normal(jax.random.key(1), (4, 30))
    got = quantized_matmul(x, stored["codes"], stored["scale"], stored.get("zero"), bits=bits)
    want = np.asarray(x, np.float64) @ np.asarray(merge(model, params)["w"], np.float64)
    assert distance(got, want) < TOLERANCE["float32"]


def test_misuse_is_refused():
    x, codes, scale = jnp.ones((2, 6)), jnp.ones((6, 3), jnp.int8), jnp.ones((2, 3))
    with pytest.raises(ValueError, match="bits=3, expected 8 or 4"):
        quantized_matmul(x, codes, scale, bits=3)
    with pytest.raises(
        ValueError, match=r"codes are int8 \(6, 3\), expected uint8 \(3, out\) for 4"
    ):
        quantized_matmul(x, codes, scale, bits=4)
    with pytest.raises(ValueError, match=r"scale has shape \(4, 3\)"):
        quantized_matmul(x, codes, jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="zero is float32"):
        quantized_matmul(x, codes.astype(jnp.uint8), scale, jnp.ones((2, 3)))
    with pytest.raises(NotImplementedError, match=r"multiples of 128.*multiples of 32"):
        quantized_matmul(x, codes, scale, implementation="pallas")
    with pytest.raises(NotImplementedError, match=r"cuda: x has 9 rows \(it takes 1 to 8\)"):
        quantized_matmul(jnp.ones((9, 6)), codes, scale, implementation="pallas", interpret="cuda")
