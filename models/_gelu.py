"""The Gaussian error linear unit."""

import math

import jax

from fnml.models._native import native_takes
from fnml.pallas_kernels.native import call, on_cpu


def _plain(x: jax.Array) -> jax.Array:
    inner = math.sqrt(8 / math.pi) * (x + 0.044715 * (x * x * x))
    return x * jax.nn.sigmoid(inner)


@jax.custom_vjp
def _native(x: jax.Array) -> jax.Array:
    return on_cpu(lambda x: call("fnml_gelu_forward", jax.typeof(x), x), _plain, x)


def _forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _native(x), x


def _backward(x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    def backward(x: jax.Array, grad: jax.Array) -> jax.Array:
        return call("fnml_gelu_backward", jax.typeof(x), x, grad)

    def plain(x: jax.Array, grad: jax.Array) -> jax.Array:
        return jax.vjp(_plain, x)[1](grad)[0]

    return (on_cpu(backward, plain, x, grad),)


_native.defvjp(_forward, _backward)


def gelu(x: jax.Array) -> jax.Array:
    """Return GELU of ``x`` in its tanh form, for any shape.

    ``0.5 * x * (1 + tanh(u))`` with ``u = sqrt(2 / pi) * (x + 0.044715 * x**3)`` is written
    ``x * sigmoid(2 * u)``, the same function; it is faster than the erf form on a CPU
    and differs from it by at most 5e-4. Within :func:`fnml.pallas_kernels.native_kernels` it runs
    in C++ on a CPU, with a custom VJP: there is no forward mode (``jax.jvp``) then.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2.

    >>> import jax.numpy as jnp
    >>> gelu(jnp.array([0.0, 1.0])).round(4).tolist()
    [0.0, 0.8411999940872192]
    """
    return (_native if native_takes(x) else _plain)(x)
