"""Attention in tiles: causal, windowed, grouped, segmented, with bias, soft cap and dropout."""

from fnml.pallas_kernels.attention._attention import attention as attention
from fnml.pallas_kernels.attention._ring import ring_attention as ring_attention
