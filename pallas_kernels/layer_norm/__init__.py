"""Layer normalisation."""

from fnml.pallas_kernels.layer_norm._layer_norm import layer_norm as layer_norm
