"""Write products of arrays: MatMul where the axes lie as it wants them, Einsum elsewhere."""

import string
from collections.abc import Mapping
from typing import Any

import numpy as np

from fnml.interop.onnx._builder import Builder, Lowering
from fnml.interop.onnx._lower_shape import shape_of
from fnml.interop.onnx._support import widest

_BYTES = (np.dtype(np.int8), np.dtype(np.uint8))


def _dot_general(g: Builder, eqn: Any, a: str, b: str) -> str:
    (over_a, over_b), (batch_a, batch_b) = eqn.params["dimension_numbers"]
    ranks = len(shape_of(eqn.invars[0])), len(shape_of(eqn.invars[1]))
    free_a = [i for i in range(ranks[0]) if i not in (*over_a, *batch_a)]
    free_b = [i for i in range(ranks[1]) if i not in (*over_b, *batch_b)]
    result = np.dtype(eqn.outvars[0].aval.dtype)
    plain = len(over_a) == 1 and (
        len(free_b) <= 1 if not batch_a else len(free_a) == len(free_b) == 1
    )
    if plain:
        a = g.transpose(a, [*batch_a, *free_a, *over_a])
        b = g.transpose(b, [*batch_b, *over_b, *free_b])
        bytes_ = g.dtypes[a] in _BYTES and g.dtypes[b] in _BYTES
        if bytes_ and result == np.int32:
            return g("MatMulInteger", a, b, dtype=result)
        a, b = _widened(g, a, b, result)
        return g.cast(g("MatMul", a, b), result)
    a, b = _widened(g, a, b, result)
    letters = iter(string.ascii_letters)
    names_a: dict[int, str] = {i: next(letters) for i in range(ranks[0])}
    names_b: dict[int, str] = {}
    for i, k in (*zip(over_a, over_b, strict=True), *zip(batch_a, batch_b, strict=True)):
        names_b[k] = names_a[i]
    names_b |= {k: next(letters) for k in free_b}
    read = (
        "".join(names[i] for i in range(rank))
        for names, rank in zip((names_a, names_b), ranks, strict=True)
    )
    out = "".join([*(names_a[i] for i in (*batch_a, *free_a)), *(names_b[k] for k in free_b)])
    return g.cast(g("Einsum", a, b, equation=f"{','.join(read)}->{out}"), result)


def _widened(g: Builder, a: str, b: str, result: np.dtype[Any]) -> tuple[str, str]:
    """Return the factors in the dtype to sum in: at least their own, at least the result's."""
    dtype = widest(g.dtypes[a], g.dtypes[b], result)
    return g.cast(a, dtype), g.cast(b, dtype)


LOWERINGS: Mapping[str, Lowering] = {"dot_general": _dot_general}
