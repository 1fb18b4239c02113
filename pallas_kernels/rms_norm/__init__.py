"""Root-mean-square normalisation."""

from fnml.pallas_kernels.rms_norm._rms_norm import rms_norm as rms_norm
