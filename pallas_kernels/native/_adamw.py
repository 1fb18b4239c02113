"""AdamW on CPUs in C++: all arrays of a model in one call, in one pass over memory."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from fnml.pallas_kernels.native._library import register
from fnml.pallas_kernels.native._scope import in_use


class Updated(NamedTuple):
    """An array of parameters, and the moving means of its gradient and of the gradient's square."""

    param: jax.Array
    mean: jax.Array
    square: jax.Array


def adamw_update(
    grads: Sequence[jax.Array],
    arrays: Sequence[Updated],
    decays: Sequence[float],
    *,
    rate: jax.Array,
    count: jax.Array,
    b1: float,
    b2: float,
    eps: float,
) -> list[Updated]:
    """Return the arrays after a step, in the memory of those before, which XLA copies where needed.

    ``decays`` are the arrays' weight decays; the rate is float32. ``count`` is int32: how many steps
    there were, this one included.
    """
    operands = [x for grad, held in zip(grads, arrays, strict=True) for x in (grad, *held)]
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for held in arrays for x in held]
    places = [2 + 4 * i + k for i in range(len(arrays)) for k in (1, 2, 3)]
    in_place = {place: result for result, place in enumerate(places)}
    name = register(in_use().library, "fnml_adamw")
    out = jax.ffi.ffi_call(name, results, input_output_aliases=in_place)(
        rate,
        count,
        *operands,
        decay=np.asarray(decays, np.float32),
        b1=np.float64(b1),
        b2=np.float64(b2),
        eps=np.float64(eps),
    )
    return [Updated(*out[i : i + 3]) for i in range(0, len(out), 3)]
