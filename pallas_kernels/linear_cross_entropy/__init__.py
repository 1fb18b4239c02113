"""The cross entropy of a linear layer's logits, which are never all in memory."""

from fnml.pallas_kernels.linear_cross_entropy._linear_cross_entropy import (
    linear_cross_entropy as linear_cross_entropy,
)
