"""The yardstick: the rate of a float32 matrix product of 2,048 in JAX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax_rows import on_device
from problems import Problem

__all__ = ["gemm", "on_device", "value", "versions"]


def versions() -> dict[str, str]:
    return {"jax": jax.__version__}


def value(x: jax.Array) -> float:
    return float(x[0, 0])


def gemm(problem: Problem, variant: str) -> tuple[Any, Callable]:
    product = jax.jit(lambda x: x @ x)
    return jnp.full((2048, 2048), 2.0**-11), lambda state, batch: (state, product(state))
