"""The gated activation of Llama's feed-forward layers."""

import jax

from fnml.models._native import native_takes
from fnml.pallas_kernels.native import call, on_cpu

Pair = tuple[jax.Array, jax.Array]


def _plain(gate: jax.Array, up: jax.Array) -> jax.Array:
    return gate * jax.nn.sigmoid(gate) * up


@jax.custom_vjp
def _native(gate: jax.Array, up: jax.Array) -> jax.Array:
    def forward(gate: jax.Array, up: jax.Array) -> jax.Array:
        return call("fnml_swiglu_forward", jax.typeof(gate), gate, up)

    return on_cpu(forward, _plain, gate, up)


def _forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, Pair]:
    return _native(gate, up), (gate, up)


def _backward(saved: Pair, grad: jax.Array) -> Pair:
    def backward(gate: jax.Array, up: jax.Array, grad: jax.Array) -> Pair:
        like = jax.typeof(gate)
        return tuple(call("fnml_swiglu_backward", (like, like), gate, up, grad))

    def plain(gate: jax.Array, up: jax.Array, grad: jax.Array) -> Pair:
        return jax.vjp(_plain, gate, up)[1](grad)

    return on_cpu(backward, plain, *saved, grad)


_native.defvjp(_forward, _backward)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return ``gate * sigmoid(gate) * up`` for two arrays of one shape and dtype.

    Within :func:`fnml.pallas_kernels.native_kernels` it runs in C++ on a CPU, with a custom VJP:
    there is no forward mode (``jax.jvp``) then.

    Source: Shazeer 2020, arXiv:2002.05202, equation 5.

    >>> import jax.numpy as jnp
    >>> swiglu(jnp.array([0.0, 2.0]), jnp.array([3.0, 3.0])).round(3).tolist()
    [0.0, 5.285000324249268]
    """
    return (_native if native_takes(gate, up) else _plain)(gate, up)
