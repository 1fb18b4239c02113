"""Each group of rows times its own matrix."""

from fnml.pallas_kernels.grouped_matmul._grouped_matmul import grouped_matmul as grouped_matmul
