"""What the tests of all kernels share: rows to compile, float64 comparison, interpreters."""

import importlib
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    """One program to lower and compile for hardware that is not there.

    A row lives in ``<kernel>_rows.py`` beside this file, in its list ``CASES``.

    Attributes:
      name: unique, such as ``"attention grad bf16 T=2048 D=128"``.
      function: of arrays, with the default ``implementation="auto"``.
      arguments: the arrays' shapes and dtypes.
      calls: the number of hand-written kernels by platform; a platform left out has none.
      cudnn: the number of cuDNN's kernels on cuda.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    calls: dict[str, int]
    cudnn: int = 0


def shape(*dims: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """Abbreviate the description of an argument."""
    return jax.ShapeDtypeStruct(dims, dtype)


def all_cases() -> list[Case]:
    """Collect the rows of every kernel."""
    files = sorted(Path(__file__).parent.glob("*_rows.py"))
    return [case for file in files for case in importlib.import_module(file.stem).CASES]


def one_per_kernel(cases: list[Case], platform: str) -> list[Case]:
    """Choose the row of each kernel in which most of its bodies are called."""
    kernels: dict[str, list[Case]] = {}
    for case in cases:
        kernels.setdefault(case.name.split()[0], []).append(case)
    return [max(rows, key=lambda case: case.calls.get(platform, 0)) for rows in kernels.values()]


PALLAS_TARGETS = {"tpu_custom_call", "mosaic_gpu_v2", "mosaic_gpu", "__gpu$xla.gpu.triton"}


def custom_calls(
    function: Callable[..., Any], arguments: tuple, *platforms: str
) -> dict[str, Counter]:
    """Count the custom calls by target, when ``function`` is lowered for each platform."""
    traced = jax.jit(function).trace(*arguments)

    def count(platform: str) -> Counter:
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return Counter(re.findall(r"custom_call @([\w$.]+)", text))

    return {platform: count(platform) for platform in platforms}


def pallas_calls(calls: Counter) -> int:
    """Count hand-written kernels among custom calls."""
    return sum(count for target, count in calls.items() if target in PALLAS_TARGETS)


def cudnn_calls(calls: Counter) -> int:
    """Count cuDNN's kernels among custom calls."""
    return sum(count for target, count in calls.items() if target.startswith("__cudnn"))


def double(function: Callable[..., Any], *arrays: Any) -> Any:
    """Run ``function`` in float64 and return NumPy arrays; integers and keys stay as they are."""

    def wide(x: Any) -> Any:
        if not hasattr(x, "dtype") or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    with jax.enable_x64(True):
        out = jax.jit(function)(*jax.tree.map(wide, arrays))
        return jax.tree.map(np.asarray, out)


def distance(got: Any, want: Any) -> float:
    """Return the largest relative distance, in norm, of the arrays of two trees.

    An array of zeros is compared absolutely.
    """

    def one(a: Any, b: Any) -> float:
        a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
        assert a.shape == b.shape
        assert np.isfinite(a).all()
        return float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0))

    return max(jax.tree.leaves(jax.tree.map(one, got, want)))


# Relative norms against float64 on rounded inputs: a few roundings of the format's last bit, and
# float32's sums below it.
TOLERANCE = {"float32": 3e-6, "bfloat16": 1.2e-2, "float16": 1.5e-3}


def strict_tpu() -> Any:
    """Return the TPU interpreter that raises for races and for reads out of bounds."""
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise")


def races(platform: str = "tpu") -> bool:
    """Tell whether the last strict interpretation of a "tpu" or "cuda" kernel saw a race."""
    if platform == "cuda":
        from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

        return gpu_callbacks.get_races().races_found
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert interpret_pallas_call.races is not None, "nothing was interpreted with detect_races"
    return interpret_pallas_call.races.races_found


def strict_cuda() -> Any:
    """Return the GPU interpreter that looks for races."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(detect_races=True)
