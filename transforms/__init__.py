"""Transforms: a function in, a function of the same signature out, each with a tested law."""

if not __name__.startswith("fnml."):
    raise ImportError("import fnml.transforms: as a top-level module it would be a second copy")

from fnml.transforms._accumulate import accumulate as accumulate
from fnml.transforms._data_parallel import data_parallel as data_parallel
from fnml.transforms._ema import EmaState as EmaState
from fnml.transforms._ema import ema as ema
from fnml.transforms._ema import ema_params as ema_params
from fnml.transforms._find_rate import Rates as Rates
from fnml.transforms._find_rate import find_rate as find_rate
from fnml.transforms._fuse import fuse as fuse
from fnml.transforms._hypergradient import hypergradient as hypergradient
from fnml.transforms._loss_scaling import LossScale as LossScale
from fnml.transforms._loss_scaling import LossScaled as LossScaled
from fnml.transforms._loss_scaling import loss_scaling as loss_scaling
from fnml.transforms._loss_scaling import scaled_value_and_grad as scaled_value_and_grad
from fnml.transforms._loss_scaling import with_loss_scale as with_loss_scale
from fnml.transforms._mixed_precision import Policy as Policy
from fnml.transforms._mixed_precision import mixed_precision as mixed_precision
from fnml.transforms._noise_scale import noise_scale as noise_scale
from fnml.transforms._per_example import per_example as per_example
from fnml.transforms._pmap import pmap as pmap
from fnml.transforms._population import population as population
from fnml.transforms._private import privacy_spent as privacy_spent
from fnml.transforms._private import private as private
from fnml.transforms._remat import remat as remat
from fnml.transforms._sam import sam as sam
from fnml.transforms._skip_nonfinite import skip_nonfinite as skip_nonfinite
