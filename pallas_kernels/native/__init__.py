"""C++ bodies for CPUs, called through jax.ffi: when they run, and how they get there."""

from fnml.pallas_kernels.native._adamw import Updated as Updated
from fnml.pallas_kernels.native._adamw import adamw_update as adamw_update
from fnml.pallas_kernels.native._batch_norm import (
    batch_norm_relu_backward as batch_norm_relu_backward,
)
from fnml.pallas_kernels.native._batch_norm import (
    batch_norm_relu_forward as batch_norm_relu_forward,
)
from fnml.pallas_kernels.native._call import call as call
from fnml.pallas_kernels.native._call import floats as floats
from fnml.pallas_kernels.native._call import on_cpu as on_cpu
from fnml.pallas_kernels.native._call import unbatched as unbatched
from fnml.pallas_kernels.native._conv2d import Window as Window
from fnml.pallas_kernels.native._conv2d import conv2d_forward as conv2d_forward
from fnml.pallas_kernels.native._conv2d import conv2d_input_gradient as conv2d_input_gradient
from fnml.pallas_kernels.native._conv2d import conv2d_kernel_gradient as conv2d_kernel_gradient
from fnml.pallas_kernels.native._faults import faults_of as faults_of
from fnml.pallas_kernels.native._library import build_native as build_native
from fnml.pallas_kernels.native._library import native_faults as native_faults
from fnml.pallas_kernels.native._linear import linear_forward as linear_forward
from fnml.pallas_kernels.native._linear import linear_input_gradient as linear_input_gradient
from fnml.pallas_kernels.native._linear import linear_kernel_gradient as linear_kernel_gradient
from fnml.pallas_kernels.native._norms import norm_backward as norm_backward
from fnml.pallas_kernels.native._norms import norm_forward as norm_forward
from fnml.pallas_kernels.native._scope import active as active
from fnml.pallas_kernels.native._scope import has_tiles as has_tiles
from fnml.pallas_kernels.native._scope import in_use as in_use
from fnml.pallas_kernels.native._scope import native_kernels as native_kernels
from fnml.pallas_kernels.native._scope import unavailable as unavailable
