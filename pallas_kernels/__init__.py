"""Custom kernels for TPUs, GPUs and CPUs, with their references and derivatives."""

if not __name__.startswith("fnml."):
    raise ImportError("import fnml.pallas_kernels: as a top-level module it would be a second copy")

from fnml.pallas_kernels._implementation import Implementation as Implementation
from fnml.pallas_kernels.attention import attention as attention
from fnml.pallas_kernels.decode_attention import cache_update as cache_update
from fnml.pallas_kernels.decode_attention import decode_attention as decode_attention
from fnml.pallas_kernels.decode_attention import paged_update as paged_update
from fnml.pallas_kernels.decode_attention import quantize_cache as quantize_cache
from fnml.pallas_kernels.grouped_matmul import grouped_matmul as grouped_matmul
from fnml.pallas_kernels.layer_norm import layer_norm as layer_norm
from fnml.pallas_kernels.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from fnml.pallas_kernels.native import build_native as build_native
from fnml.pallas_kernels.native import native_faults as native_faults
from fnml.pallas_kernels.native import native_kernels as native_kernels
from fnml.pallas_kernels.quantized_matmul import QuantizedMatrix as QuantizedMatrix
from fnml.pallas_kernels.quantized_matmul import quantized_matmul as quantized_matmul
from fnml.pallas_kernels.rms_norm import rms_norm as rms_norm
