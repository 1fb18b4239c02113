"""Are the kernels right on a GPU, and how fast are they beside cuDNN, XLA and the ceilings?

Run: ``python benchmarks/kernels_gpu.py`` on a machine with an NVIDIA GPU; elsewhere it says why it
does nothing. Every row is first compared with the reference in float32, then timed: the median of
calls that take turns, each call a chain of enough runs to take about 20 ms, so that the dispatch does not
count. The ceilings are measured beside them: a large bfloat16 product, and a copy. Targets on an
H200: attention forward at least 0.6 of the product's rate at T=8192, D=128, and at least 0.85 of
cuDNN's speed; norms at least 0.8 of the copy's bandwidth; ``quantized_matmul`` at M=1 at least 1.6
times the bfloat16 product.
"""

import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich import print
from rich.table import Table
from turns import turns

from fnml.pallas_kernels import (
    attention,
    decode_attention,
    grouped_matmul,
    layer_norm,
    linear_cross_entropy,
    quantize_cache,
    quantized_matmul,
    rms_norm,
)


class Row(NamedTuple):
    """One problem.

    Attributes:
      name: of the row.
      arrays: what every contestant gets.
      contestants: functions by name, ours first.
      reference: the same function, to be run in float32.
      tolerance: on the relative distance from the reference, in norm.
      flops, bytes: what one run computes and moves, for the rates; 0 for none.
    """

    name: str
    arrays: tuple[jax.Array, ...]
    contestants: dict[str, Callable[..., Any]]
    reference: Callable[..., Any]
    tolerance: float
    flops: float = 0
    bytes: float = 0


def attention_rows() -> list[Row]:
    """Causal attention in bfloat16, forward, and value and gradient."""
    rows = []
    for B, T, H, D in ((4, 1024, 16, 64), (1, 8192, 16, 128)):
        keys = jax.random.split(jax.random.key(0), 3)
        arrays = tuple(jax.random.normal(key, (B, T, H, D), jnp.bfloat16) for key in keys)

        def call(**options: Any) -> Callable[..., Any]:
            return lambda q, k, v: attention(q, k, v, causal=True, **options)

        def grads(function: Callable[..., Any]) -> Callable[..., Any]:
            def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                return jnp.sin(function(q, k, v).astype(jnp.float32)).sum()

            return jax.grad(loss, (0, 1, 2))

        forward = {
            "fnml": call(implementation="pallas"),
            "cuDNN": call(implementation="cudnn"),
            "lax (XLA)": call(implementation="lax"),
        }
        products = 2 * B * H * T * (T + 1) / 2 * D
        for part, wrap, count in (("forward", lambda f: f, 2), ("gradient", grads, 9)):
            rows.append(
                Row(
                    f"attention {part} B={B} T={T} H={H} D={D}",
                    arrays,
                    {name: wrap(function) for name, function in forward.items()},
                    wrap(call(implementation="lax")),
                    1e-2 if part == "forward" else 2e-2,
                    flops=count * products,
                )
            )
    return rows


def _normed(norm: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda x, y, scale: norm(x, scale, residual=y, **options)


def _and_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    def back(x: jax.Array, y: jax.Array, scale: jax.Array) -> Any:
        # Arrays at hand stand in for the gradients of the results.
        (out, _), vjp = jax.vjp(lambda x, scale: function(x, y, scale), x, scale)
        return vjp((out, y))

    return back


def norm_rows() -> list[Row]:
    """A sum and its norm in bfloat16, forward, and with gradients."""
    keys = jax.random.split(jax.random.key(0), 2)
    x, y = (jax.random.normal(key, (8192, 4096), jnp.bfloat16) for key in keys)
    arrays = (x, y, jnp.ones(4096, jnp.float32))
    rows = []
    for norm in (rms_norm, layer_norm):
        forward = {
            "fnml": _normed(norm, implementation="pallas"),
            "lax (XLA)": _normed(norm, implementation="lax"),
            "textbook": _normed(norm, implementation="reference"),
        }
        # Two arrays in and two out; the gradients take three more in and one out.
        for part, wrap, count in (("forward", lambda f: f, 4), ("gradients", _and_gradients, 8)):
            contestants = {name: wrap(function) for name, function in forward.items()}
            name = f"{norm.__name__} with a sum 8192x4096, {part}"
            reference = contestants["textbook"]
            rows.append(Row(name, arrays, contestants, reference, 2e-2, 0, count * x.nbytes))
    return rows


def _quantized(bits: int, **options: Any) -> Callable[..., Any]:
    return lambda x, codes, scale, weight: quantized_matmul(x, codes, scale, bits=bits, **options)


def quantized_rows() -> list[Row]:
    """A few rows times 4096 x 8192 codes, int8 and int4, beside bfloat16 weights."""
    rows = []
    for bits, M in ((8, 1), (4, 1), (8, 8)):
        keys = jax.random.split(jax.random.key(0), 2)
        x = jax.random.normal(keys[0], (M, 4096), jnp.bfloat16)
        scale = jnp.full((32, 8192), 0.01, jnp.float32)
        if bits == 8:
            whole = codes = jax.random.randint(keys[1], (4096, 8192), -127, 128, jnp.int8)
        else:
            codes = jax.random.randint(keys[1], (2048, 8192), 0, 256, jnp.uint8)
            whole = jnp.concatenate([codes & 15, codes >> 4]).astype(jnp.int8) - 8
        weight = (whole.astype(jnp.float32) * 0.01).astype(jnp.bfloat16)
        contestants = {
            "fnml": _quantized(bits, implementation="pallas"),
            "lax (XLA)": _quantized(bits, implementation="lax"),
            "dequantise, then x @ w": _quantized(bits, implementation="reference"),
            "bfloat16 weights": lambda x, codes, scale, weight: x @ weight,
        }
        reference = contestants["dequantise, then x @ w"]
        arrays = (x, codes, scale, weight)
        name = f"quantized_matmul int{bits} {M}x4096x8192"
        rows.append(Row(name, arrays, contestants, reference, 2e-2, 0, codes.nbytes))
    return rows


def decode_rows() -> list[Row]:
    """One token of 16 sequences against a full cache of 8192, in bfloat16 and in bytes."""
    B, S, H, K, D = 16, 8192, 32, 8, 128
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (B, 1, H, D), jnp.bfloat16)
    k, v = (jax.random.normal(key, (B, S, K, D), jnp.bfloat16) for key in keys[1:])
    (k8, k_scale), (v8, v_scale) = quantize_cache(k), quantize_cache(v)
    lengths = jnp.full(B, S, jnp.int32)

    def call(**options: Any) -> Callable[..., Any]:
        def run(q: Any, k: Any, v: Any, lengths: Any, *scales: Any) -> jax.Array:
            named = dict(zip(("k_scale", "v_scale"), scales, strict=False))
            return decode_attention(q, k, v, lengths, **named, **options)

        return run

    def cudnn(q: Any, k: Any, v: Any, lengths: Any) -> jax.Array:
        lengths = {"query_seq_lengths": jnp.ones_like(lengths), "key_value_seq_lengths": lengths}
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **lengths)

    ours = {"fnml": call(implementation="pallas"), "lax (XLA)": call(implementation="lax")}
    reference = call(implementation="lax")
    codes = (q, k8, v8, lengths, k_scale, v_scale)
    moved = 2 * k8.nbytes + 2 * k_scale.nbytes
    return [
        Row(
            f"decode_attention B={B} S={S} H={H} K={K} D={D}",
            (q, k, v, lengths),
            {**ours, "cuDNN": cudnn},
            reference,
            1e-2,
            0,
            2 * k.nbytes,
        ),
        Row("decode_attention int8, the same", codes, ours, reference, 1e-2, 0, moved),
    ]


def grouped_rows() -> list[Row]:
    """8192 rows of 8 unequal groups times 1024 x 2816, value and gradients."""
    N, E, D, F = 8192, 8, 1024, 2816
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (N, D), jnp.bfloat16)
    w = jax.random.normal(keys[1], (E, D, F), jnp.bfloat16)
    sizes = jnp.array([1700, 300, 1024, 1000, 2000, 90, 1078, 1000], jnp.int32)

    def call(**options: Any) -> Callable[..., Any]:
        return lambda x, w, sizes: grouped_matmul(x, w, sizes, **options)

    def grads(function: Callable[..., Any]) -> Callable[..., Any]:
        def loss(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
            return (function(x, w, sizes).astype(jnp.float32) ** 2).sum()

        return jax.grad(loss, (0, 1))

    contestants = {
        "fnml": call(implementation="pallas"),
        "lax (XLA)": call(implementation="lax"),
        "ragged_dot": jax.lax.ragged_dot,
    }
    return [
        Row(
            f"grouped_matmul {part} {N} x {D} x {F}, {E} groups",
            (x, w, sizes),
            {name: wrap(function) for name, function in contestants.items()},
            wrap(call(implementation="lax")),
            1e-2 if part == "forward" else 2e-2,
            flops=count * 2 * N * D * F,
        )
        for part, wrap, count in (("forward", lambda f: f, 1), ("gradient", grads, 3))
    ]


def loss_rows() -> list[Row]:
    """The loss of 8192 tokens and 32768 classes, and with its gradient."""
    N, D, V = 8192, 1024, 32768
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (N, D), jnp.bfloat16)
    w = jax.random.normal(keys[1], (D, V), jnp.bfloat16) * D**-0.5
    labels = jax.random.randint(keys[2], (N,), 0, V)

    def call(**options: Any) -> Callable[..., Any]:
        return lambda x, w, labels: linear_cross_entropy(x, w, labels, **options)[0] / N

    bodies = {"fnml": "pallas", "lax (XLA)": "lax", "textbook": "reference"}
    contestants = {name: call(implementation=body) for name, body in bodies.items()}
    return [
        Row(
            f"linear_cross_entropy {part} {N} x {D} x {V}",
            (x, w, labels),
            {name: wrap(function) for name, function in contestants.items()},
            wrap(call(implementation="lax")),
            2e-2,
            flops=count * 2 * N * D * V,
        )
        for part, wrap, count in (
            ("forward", lambda f: f, 1),
            ("gradient", lambda f: jax.value_and_grad(f, (0, 1)), 3),
        )
    ]


TABLES = (attention_rows, norm_rows, quantized_rows, decode_rows, grouped_rows, loss_rows)


def repeated(function: Callable[..., Any], times: int) -> Callable[..., Any]:
    """Return a compiled function that runs ``function`` several times, one after another."""

    def run(*arrays: jax.Array) -> jax.Array:
        def one(_: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            out = jax.tree.leaves(function(*carry))
            # Each run waits for all results of the last one, by a zero added to one element. Zero
            # times a float is no zero to a compiler (it may be NaN), so nothing is left out.
            zero = sum(x[(0,) * x.ndim].astype(jnp.float32) for x in out) * 0
            first = carry[0]
            return (first.at[(0,) * first.ndim].add(zero.astype(first.dtype)), *carry[1:])

        return jax.lax.fori_loop(0, times, one, arrays)

    return jax.jit(run)


def seconds_of(functions: dict[str, Callable[..., Any]], arrays: Any) -> dict[str, float]:
    """Return the median time of one run of each."""
    programs = {name: jax.jit(function) for name, function in functions.items()}
    once = turns({n: lambda f=f: f(*arrays) for n, f in programs.items()}, 3)
    guess = {name: statistics.median(times) for name, times in once.items()}
    count = {name: max(1, round(0.02 / guess[name])) for name in functions}
    chains = {name: repeated(function, count[name]) for name, function in functions.items()}
    times = turns({n: lambda f=f: f(*arrays) for n, f in chains.items()}, 10)
    return {name: statistics.median(found) / count[name] for name, found in times.items()}


def ceilings() -> tuple[float, float]:
    """Measure the rate of a bfloat16 product of 8192 cubed, and of a copy of 1 GiB."""
    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    b = jnp.zeros((2**28,), jnp.float32)
    product = seconds_of({"": lambda a: a @ a}, (a,))[""]
    copy = seconds_of({"": lambda b: b + 1}, (b,))[""]
    return 2 * 8192**3 / product, 2 * b.nbytes / copy


def distance(got: Any, want: Any) -> float:
    """Return the largest relative distance, in norm, of the arrays of two trees."""

    def one(a: jax.Array, b: jax.Array) -> float:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))

    return max(jax.tree.leaves(jax.tree.map(one, got, want)))


def check(row: Row) -> None:
    """Compare every contestant with the reference in float32.

    Raises:
      SystemExit: one of them is off.
    """
    with jax.default_matmul_precision("highest"):
        wide = (x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in row.arrays)
        want = jax.jit(row.reference)(*wide)
    for name, function in row.contestants.items():
        off = distance(jax.jit(function)(*row.arrays), want)
        if not off < row.tolerance:
            sys.exit(f"{row.name}: {name} is off by {off:.2e}, expected below {row.tolerance}")


def main() -> None:
    if jax.default_backend() != "gpu":
        print(f"skipped: no GPU here (JAX runs on {jax.default_backend()})")
        return
    flops, bandwidth = ceilings()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(
        f"ceilings: {flops / 1e12:.0f} TFLOP/s in bfloat16, {bandwidth / 1e12:.2f} TB/s of copies"
    )
    table = Table("problem", "contestant", "us", "speed beside ours", "of the ceiling")
    for rows in TABLES:
        for row in rows():
            check(row)
            found = seconds_of(row.contestants, row.arrays)
            ours = next(iter(found.values()))
            for name, seconds in found.items():
                share = max(row.flops / seconds / flops, row.bytes / seconds / bandwidth)
                values = (f"{1e6 * seconds:.1f}", f"{ours / seconds:.2f}")
                table.add_row(row.name, name, *values, f"{share:.2f}" if share else "")
            table.add_section()
    print(table)


if __name__ == "__main__":
    main()
