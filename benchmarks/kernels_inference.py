"""What do quantised, grouped and decoding products cost on a CPU, beside what XLA makes of them?

Run: ``python benchmarks/kernels_inference.py [quantized] [grouped] [decode] [norms]``. Medians of
the times, of their ratios within each turn to ours, and the temporaries that XLA plans.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from kernels_cpu import Row, row
from rich import print
from rich.table import Table
from turns import turns

from fnml.pallas_kernels import (
    decode_attention,
    grouped_matmul,
    quantize_cache,
    quantized_matmul,
    rms_norm,
)


def quantized_rows() -> Iterator[Row]:
    """One or 128 rows times a matrix of 2,048 x 8,192 in groups of 128."""
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(2048, 8192)), jnp.float32)
    scale = jnp.ones((16, 8192), jnp.float32)
    codes = {
        8: jnp.asarray(rng.integers(-127, 128, (2048, 8192)), jnp.int8),
        4: jnp.asarray(rng.integers(0, 256, (1024, 8192)), jnp.uint8),
    }
    for M in (1, 128):
        x = jnp.asarray(rng.normal(size=(M, 2048)), jnp.float32)
        for bits, stored in codes.items():

            def ours(x: jax.Array, codes: Any, scale: Any, _: Any, bits: int = bits) -> jax.Array:
                return quantized_matmul(x, codes, scale, bits=bits)

            def whole(x: jax.Array, codes: Any, scale: Any, _: Any, bits: int = bits) -> jax.Array:
                return quantized_matmul(x, codes, scale, bits=bits, implementation="reference")

            candidates = {"fnml": ours, "dequantise, then x @ w": whole}
            candidates["float32 weights"] = lambda x, codes, scale, weight: x @ weight
            yield row(f"int{bits}, {M} rows", candidates, x, stored, scale, weight)


def _slope(product: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Return the gradients of a grouped product's square."""
    return jax.grad(lambda x, w, sizes: jnp.sum(product(x, w, sizes) ** 2), (0, 1))


def _with_grads(norm: Callable[..., Any]) -> Callable[..., Any]:
    """Return a fused norm's results and gradients."""

    def run(x: Any, y: Any, scale: Any, g: Any) -> Any:
        out, back = jax.vjp(norm, x, y, scale)
        return out, back((g, g))

    return run


def grouped_rows() -> Iterator[Row]:
    """Rows sorted by expert, D=256, F=704, forward and backward."""
    rng = np.random.default_rng(0)
    for N, E in ((512, 8), (4096, 8), (4096, 32)):
        x = jnp.asarray(rng.normal(size=(N, 256)), jnp.float32)
        w = jnp.asarray(rng.normal(size=(E, 256, 704)), jnp.float32)
        sizes = jnp.asarray(np.bincount(rng.integers(0, E, N), minlength=E), jnp.int32)
        candidates = {"fnml": grouped_matmul, "lax.ragged_dot": lax.ragged_dot}
        candidates["one dense product"] = lambda x, w, sizes: x @ w[0]
        functions = {name: _slope(function) for name, function in candidates.items()}
        yield row(f"{N} rows, {E} groups", functions, x, w, sizes)


def decode_rows() -> Iterator[Row]:
    """One token of eight sequences, eight query heads on two of 64, caches of 4,096 tokens."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(8, 1, 8, 64)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(8, 4096, 2, 64)), jnp.float32) for _ in range(2))
    (k8, k_scale), (v8, v_scale) = quantize_cache(k), quantize_cache(v)
    for length in (256, 4096):
        lengths = jnp.full(8, length, jnp.int32)

        def floats(q: Any, k: Any, v: Any, lengths: Any, *_: Any) -> jax.Array:
            return decode_attention(q, k, v, lengths)

        def of_bytes(q: Any, k: Any, v: Any, lengths: Any, *codes: Any) -> jax.Array:
            k8, k_scale, v8, v_scale = codes
            return decode_attention(q, k8, v8, lengths, k_scale=k_scale, v_scale=v_scale)

        def library(q: Any, k: Any, v: Any, lengths: Any, *_: Any) -> jax.Array:
            return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)

        candidates = {"fnml": floats, "fnml, int8 cache": of_bytes, "jax.nn": library}
        arrays = (q, k, v, lengths, k8, k_scale, v8, v_scale)
        yield row(f"length {length}", candidates, *arrays)


def norm_rows() -> Iterator[Row]:
    """A sum and its RMS norm, forward and backward; the body that every platform but TPU runs."""
    rng = np.random.default_rng(0)
    for shape in ((4096, 256), (4096, 1024)):
        x, y, g = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3))
        scale = jnp.ones(shape[1], jnp.float32)

        def fused(x: Any, y: Any, scale: Any) -> Any:
            return rms_norm(x, scale, y)

        def textbook(x: Any, y: Any, scale: Any) -> Any:
            return rms_norm(x, scale, y, implementation="reference")

        functions = {"fnml": _with_grads(fused), "textbook": _with_grads(textbook)}
        yield row(f"{shape[0]} x {shape[1]}", functions, x, y, scale, g)


TABLES = {
    "quantized": quantized_rows,
    "grouped": grouped_rows,
    "decode": decode_rows,
    "norms": norm_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="default: all of them")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    for name in options.tables or TABLES:
        table = Table(name, "contestant", "ms", "times ours", "temporaries, MiB")
        for found in TABLES[name]():
            times = turns(found.functions, options.rounds)
            for key, seconds in times.items():
                ratios = [a / b for a, b in zip(seconds, times["fnml"], strict=True)]
                cells = (
                    f"{1e3 * statistics.median(seconds):.2f}",
                    f"{statistics.median(ratios):.2f}",
                    f"{found.temporaries[key] / 2**20:.1f}",
                )
                print(found.name, key, *cells, file=sys.stderr)
                table.add_row(found.name, key, *cells)
            table.add_section()
        print(table)


if __name__ == "__main__":
    main()
