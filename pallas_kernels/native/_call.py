"""Call a C++ body inside a program, beside the form that runs wherever it cannot."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from fnml.pallas_kernels.native._library import register
from fnml.pallas_kernels.native._scope import in_use

Function = Callable[..., Any]


def call(target: str, results: Any, *operands: jax.Array, **attributes: Any) -> Any:
    """Run the C++ function ``target`` on arrays; it gives what ``results`` describes.

    Attributes are typed strictly: ``np.float32``, ``np.int64``.
    """
    name = register(in_use().library, target)
    return jax.ffi.ffi_call(name, results)(*operands, **attributes)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    """Describe a result: all of them are float32."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def rows_of(x: jax.Array) -> jax.Array:
    """Return [..., D] as [N, D]."""
    return x.reshape(-1, x.shape[-1])


def on_cpu(native: Function, otherwise: Function, *operands: Any) -> Any:
    """Run ``native`` where this is lowered for a CPU and not vmapped, ``otherwise`` elsewhere.

    Both take the operands (any pytrees) and give results of the same shapes. Derivatives are those
    of ``otherwise``: give both rules of a ``custom_vjp`` their bodies.
    """

    @jax.custom_jvp
    def dispatch(*operands: Any) -> Any:
        return lax.platform_dependent(
            *operands, cpu=unbatched(native, otherwise), default=otherwise
        )

    @dispatch.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
        return jax.jvp(otherwise, primals, tangents)

    return dispatch(*operands)


def unbatched(native: Function, otherwise: Function) -> Function:
    """Return ``native``, with ``vmap`` of ``otherwise`` for its own ``vmap``."""

    @custom_vmap
    def body(*operands: Any) -> Any:
        return native(*operands)

    @body.def_vmap
    def _(size: int, batched: list, *operands: Any) -> tuple[Any, Any]:
        axes = jax.tree.map(lambda has: 0 if has else None, tuple(batched))
        out = jax.vmap(otherwise, in_axes=axes, axis_size=size)(*operands)
        return out, jax.tree.map(lambda _: True, out)

    return body
