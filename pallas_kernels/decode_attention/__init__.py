"""Attention from the newest tokens to a cache of keys and values."""

from fnml.pallas_kernels.decode_attention._cache import cache_update as cache_update
from fnml.pallas_kernels.decode_attention._cache import paged_update as paged_update
from fnml.pallas_kernels.decode_attention._cache import quantize_cache as quantize_cache
from fnml.pallas_kernels.decode_attention._decode_attention import (
    decode_attention as decode_attention,
)
