"""A product with a matrix that is kept in 8 or 4 bits."""

from fnml.pallas_kernels.quantized_matmul._matrix import QuantizedMatrix as QuantizedMatrix
from fnml.pallas_kernels.quantized_matmul._quantized_matmul import (
    quantized_matmul as quantized_matmul,
)
