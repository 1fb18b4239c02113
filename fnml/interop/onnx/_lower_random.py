"""Write random bits exactly: a key is its data, and Threefry is integer arithmetic."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnml.interop.onnx._builder import Builder, Lowering, Refused, elements, physical
from fnml.interop.onnx._inline import inline
from fnml.interop.onnx._lower_shape import arange

# Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", table 4 (Threefry-2x32-20).
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.array(0x1BD11BDA, np.uint32)
_KIND = "threefry2x32"


def is_key(aval: Any) -> bool:
    """Tell whether a value is an array of typed random keys."""
    return bool(jnp.issubdtype(aval.dtype, jax.dtypes.prng_key))


def _rotated(g: Builder, x: str, by: int) -> str:
    left = g("BitShift", x, np.array(by, np.uint32), direction="LEFT")
    right = g("BitShift", x, np.array(32 - by, np.uint32), direction="RIGHT")
    return g("BitwiseOr", left, right)


def _threefry(g: Builder, eqn: Any, k0: str, k1: str, x0: str, x1: str) -> list[str]:
    keys = (k0, k1, g("BitwiseXor", g("BitwiseXor", k0, k1), _PARITY))
    x0, x1 = g("Add", x0, k0), g("Add", x1, k1)
    for turn in range(5):
        for by in _ROTATIONS[turn % 2]:
            x0 = g("Add", x0, x1)
            x1 = g("BitwiseXor", _rotated(g, x1, by), x0)
        x0 = g("Add", x0, keys[(turn + 1) % 3])
        x1 = g("Add", x1, g("Add", keys[(turn + 2) % 3], np.array(turn + 1, np.uint32)))
    return [x0, x1]


def _iota_2x32(g: Builder, eqn: Any, *_: str) -> list[str]:
    """Count the elements of a shape in 64 bits; here the upper half is 0."""
    shape = eqn.params["shape"]
    count = elements(shape)
    low = g.reshape(arange(g, count, np.uint32), [count], shape)
    high = g.expand(g.constant(np.zeros((), np.uint32)), (), shape)
    return [high, low]


def _on_data(call: Callable[..., Any], out_is_key: bool) -> Lowering:
    """Write a primitive as what JAX's own implementation of the key's kind does with its data."""

    def lower(g: Builder, eqn: Any, *inputs: str) -> list[str]:
        aval = eqn.outvars[0].aval if out_is_key else eqn.invars[0].aval
        kind = aval.dtype._impl
        if kind.name != _KIND:
            raise Refused(f"of keys of the kind {kind.name}: exported are those of {_KIND}")

        function = functools.partial(call, kind, eqn.params)
        avals = [atom.aval for atom in eqn.invars]
        shapes = [jax.ShapeDtypeStruct(*physical(aval)) for aval in avals]
        traced = jax.make_jaxpr(_mapped(function, [aval.ndim for aval in avals]))(*shapes)
        return inline(g, traced, inputs, own=False)

    return lower


def _mapped(function: Callable[..., Any], ranks: list[int]) -> Callable[..., Any]:
    """Map a function of scalars over arrays of keys, and of what goes with each."""
    top = max(ranks, default=0)
    if not top:
        return function
    inner = _mapped(function, [rank - (rank == top) for rank in ranks])
    return jax.vmap(inner, in_axes=tuple(0 if rank == top else None for rank in ranks))


def _seed(kind: Any, params: Mapping[str, Any], seed: jax.Array) -> Any:
    return kind.seed(seed)


def _fold_in(kind: Any, params: Mapping[str, Any], key: jax.Array, data: jax.Array) -> Any:
    return kind.fold_in(key, data)


def _split(kind: Any, params: Mapping[str, Any], key: jax.Array) -> Any:
    return kind.split(key, params["shape"])


def _bits(kind: Any, params: Mapping[str, Any], key: jax.Array) -> Any:
    return kind.random_bits(key, params["bit_width"], params["shape"])


def _same(g: Builder, eqn: Any, x: str) -> str:
    return x


LOWERINGS: Mapping[str, Lowering] = {
    "threefry2x32": _threefry,
    "iota_2x32_shape": _iota_2x32,
    "random_seed": _on_data(_seed, out_is_key=True),
    "random_fold_in": _on_data(_fold_in, out_is_key=True),
    "random_split": _on_data(_split, out_is_key=True),
    "random_bits": _on_data(_bits, out_is_key=False),
    **dict.fromkeys(("random_wrap", "random_unwrap", "random_clone"), _same),
}
