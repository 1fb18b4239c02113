"""A matrix that stays in 8 or 4 bits until it is multiplied with."""

from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import jax

from fnml.pallas_kernels.quantized_matmul._packed import Layout, Packed, dequantize
from fnml.pallas_kernels.quantized_matmul._quantized_matmul import quantized_matmul


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedMatrix:
    """Stand in for an array of weights: codes and scales, or a stack of them for a scan.

    A linear layer multiplies with it by :meth:`multiply`. Everything else finds the numbers
    as soon as it asks for an array: ``astype``, indexing, transposing and ``jax.numpy`` functions
    dequantise the whole.

    Attributes:
      codes: [*stack, in, out], see :func:`quantized_matmul`; rows halved for 4 bits.
      scale: [*stack, groups, out].
      zero: like ``scale``, or ``None``.
      bits: 8 or 4.
      sizes: the array's shape without the stack, [in..., out...].
      dtype: the dtype of the array that it stands for.

    >>> import jax.numpy as jnp
    >>> codes, scale = jnp.ones((4, 6), jnp.int8), jnp.full((1, 6), 0.5)
    >>> matrix = QuantizedMatrix(codes, scale, None, 8, (4, 2, 3), jnp.dtype("float32"))
    >>> matrix.shape, matrix.reshape(4, 6).multiply(jnp.ones((1, 4)))[0, 0].item()
    ((4, 2, 3), 2.0)
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    bits: int = field(metadata={"static": True})
    sizes: tuple[int, ...] = field(metadata={"static": True})
    dtype: Any = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-2], *self.sizes)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def T(self) -> jax.Array:
        return self.numbers().T

    @property
    def at(self) -> Any:
        return self.numbers().at

    def __getitem__(self, index: Any) -> jax.Array:
        return self.numbers()[index]

    def __jax_array__(self) -> jax.Array:
        return self.numbers()

    def astype(self, dtype: Any) -> jax.Array:
        """Return the numbers in another dtype."""
        return self.numbers().astype(dtype)

    def numbers(self) -> jax.Array:
        """Return the array that this stands for."""
        packed = Packed(self.codes, self.scale, self.zero)
        outputs = self.codes.shape[-1]
        rows = prod(self.sizes) // outputs
        layout = Layout(self.bits, rows, rows // self.scale.shape[-2])
        each = lambda packed: dequantize(packed, layout)
        for _ in self.codes.shape[:-2]:
            each = jax.vmap(each)
        return each(packed).reshape(self.shape).astype(self.dtype)

    def reshape(self, *shape: int) -> Any:
        """Return the same codes as a matrix [in, out], or the numbers in any other shape."""
        outputs = self.codes.shape[-1]
        if self.codes.ndim == 2 and shape == (prod(self.sizes) // outputs, outputs):
            return replace(self, sizes=shape)
        return self.numbers().reshape(shape)

    def multiply(self, x: jax.Array, *, out_dtype: Any = None) -> jax.Array:
        """Return ``x @ self`` for x [..., in]: a matrix, not a stack; the numbers are constants."""
        return quantized_matmul(
            x, self.codes, self.scale, self.zero, bits=self.bits, out_dtype=out_dtype
        )
