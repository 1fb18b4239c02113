"""Run all C++ bodies of a library: ``exercise_native.py LIBRARY run|compare|plant``.

``run`` computes values and gradients, each by a program of its own, so that every operand and
result is a block of memory of its own for AddressSanitizer to guard, with matrix tiles and without. ``compare``
computes the same without C++ too and compares. ``plant`` calls one body with a result that is a number too short.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fnml import models
from fnml.models._batch_norm_relu import batch_norm_relu
from fnml.pallas_kernels import attention, layer_norm, native_kernels, rms_norm
from fnml.pallas_kernels.native import call
from fnml.train import OptimizerConfig, optimizer


def cases() -> Iterator[tuple[Callable, tuple[tuple[int, ...], ...]]]:
    """Yield functions and the shapes of their arrays: whole tiles, and all kinds of remainders."""
    for T, S, H, K, D, window in (
        (16, 1, 1, 1, 16, None),
        (65, 97, 2, 1, 16, (3, 0)),
        (130, 64, 4, 2, 48, (10**6, 5)),
        (100, 150, 2, 1, 80, (40, 60)),
    ):
        shapes = (1, T, H, D), (1, S, K, D), (1, S, K, D)
        yield partial(attention, window=window), shapes
    for rows, width, features in ((1, 1, 1), (7, 19, 67), (700, 257, 67)):
        x, scale = (rows, width), (width,)
        yield rms_norm, (x, scale)
        yield lambda *arrays: rms_norm(*arrays)[0], (x, scale, x)
        yield lambda *arrays: layer_norm(*arrays)[0], (x, scale, scale, x)
        yield models.swiglu, (x, x)
        yield models.gelu, (x,)
        by = models.rotation(np.arange(rows), 2 * width)
        yield partial(models.rotate, by=by), ((2, rows, 3, 2 * width),)
        yield models.linear, (x, (width, features), (features,))
        yield stepped, (x, x)
        yield normalised, (x, scale, scale, x)
    # Several blocks of columns and of the depth.
    yield models.linear, ((65, 600), (600, 1100), (1100,))
    # A kernel's gradient as the sum of two halves of the rows; layers that share their rows.
    yield models.linear, ((1100, 80), (80, 100), (100,))
    yield side_by_side, ((70, 65), (65, 64), (65, 100), (64,), (100,))
    # Fewer columns than a vector has, where the last rows must not be read whole.
    yield models.linear, ((65, 70), (70, 10), (10,))
    for size, channels, features, window, stride, padding in (
        (5, 1, 1, 3, 1, "SAME"),
        (9, 3, 16, 3, 2, "VALID"),
        (12, 64, 64, 3, 1, "SAME"),
        (13, 17, 33, 5, 2, "SAME"),
    ):
        convolution = partial(models.conv2d, stride=stride, padding=padding)
        yield convolution, ((3, size, size, channels), (window, window, channels, features))


def side_by_side(
    x: jax.Array, first: jax.Array, second: jax.Array, *biases: jax.Array
) -> jax.Array:
    return jnp.concatenate(models.linears(x, [first, second], biases), axis=-1)


def normalised(x: jax.Array, scale: jax.Array, bias: jax.Array, residual: jax.Array) -> jax.Array:
    return batch_norm_relu(x, scale, bias, state=None, train=True, residual=residual)[0]


def stepped(params: jax.Array, grads: jax.Array) -> jax.Array:
    rule = optimizer(OptimizerConfig("adamw", warmup=0, weight_decay=0.1), steps=10)
    updated: jax.Array = rule.apply(grads, rule.init(params), params)[0]
    return updated


def value_and_gradients(function: Callable, arrays: list[jax.Array]) -> list[jax.Array]:
    out, back = jax.vjp(jax.jit(lambda *x: function(*x)), *arrays)
    return jax.block_until_ready([out, *jax.jit(back)(jnp.cos(out))])


def main(library: Path, what: str) -> None:
    if what == "plant":
        x = jnp.ones((1, 16, 1, 16), jnp.float32)
        results = (jax.typeof(x), jax.ShapeDtypeStruct((1, 1, 15), jnp.float32))
        bounds = {"left": np.int64(-1), "right": np.int64(-1)}
        options = {"tiles": False, "scale": np.float32(1), **bounds}
        with native_kernels(library):
            short = jax.jit(lambda x: call("fnml_attention_forward", results, x, x, x, **options))
            jax.block_until_ready(short(x))
        return
    rng = np.random.default_rng(0)
    for function, shapes in cases():
        arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
        for tiles in (False, True):
            with native_kernels(library, tiles=tiles):
                found = value_and_gradients(function, arrays)
        if what == "compare":
            for x, y in zip(found, value_and_gradients(function, arrays), strict=True):
                apart, size = float(jnp.linalg.norm((x - y).ravel())), float(jnp.linalg.norm(y))
                # Winograd's sums, outside, are good to 2e-5 (measured).
                assert apart <= 5e-5 * size + 1e-5, (function, shapes, apart, size)
    print("done")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
