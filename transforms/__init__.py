"""Transforms: a function in, a function of the same signature out, each with a tested law."""

if not __name__.startswith("fnml."):
    raise ImportError("import fnml.transforms: as a top-level module it would be a second copy")

from fnml.transforms._accumulate import accumulate as accumulate
from fnml.transforms._fuse import fuse as fuse
from fnml.transforms._remat import remat as remat
