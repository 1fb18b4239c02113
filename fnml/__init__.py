"""Functional AI training on JAX: pure functions over parameter trees, and transforms with laws."""

import importlib
from typing import TYPE_CHECKING, Any

from fnml.core import FnmlError as FnmlError
from fnml.core import Mean as Mean
from fnml.core import Metrics as Metrics
from fnml.core import Model as Model
from fnml.core import Param as Param
from fnml.core import State as State
from fnml.core import abstract as abstract
from fnml.core import compilation_cache as compilation_cache
from fnml.core import count as count
from fnml.core import init as init
from fnml.core import keep_memory as keep_memory
from fnml.core import nearest as _nearest
from fnml.core import shardings as shardings

if TYPE_CHECKING:
    from fnml import checkpoint as checkpoint
    from fnml import data as data
    from fnml import interop as interop
    from fnml import laws as laws
    from fnml import models as models
    from fnml import pallas_kernels as pallas_kernels
    from fnml import parallel as parallel
    from fnml import recipes as recipes
    from fnml import sinks as sinks
    from fnml import train as train
    from fnml import transforms as transforms
    from fnml.interop import from_linen as from_linen
    from fnml.interop import from_nnx as from_nnx
    from fnml.interop import from_onnx as from_onnx
    from fnml.interop import to_onnx as to_onnx
    from fnml.plan import plan as plan

__version__ = "0.1.0"

_PARTS = frozenset(
    (
        "checkpoint",
        "data",
        "interop",
        "laws",
        "models",
        "pallas_kernels",
        "parallel",
        "plan",
        "recipes",
        "sinks",
        "train",
        "transforms",
    )
)
_FROM_PARTS = dict.fromkeys(("from_linen", "from_nnx", "from_onnx", "to_onnx"), "interop")


def __getattr__(name: str) -> Any:
    """Import a part of fnml when it is first used, so that ``import fnml`` costs what JAX costs."""
    if name in _PARTS:
        return importlib.import_module(f"fnml.{name}")
    if name in _FROM_PARTS:
        return getattr(importlib.import_module(f"fnml.{_FROM_PARTS[name]}"), name)
    options = [*globals(), *_PARTS, *_FROM_PARTS]
    raise AttributeError(f"fnml has no {name!r}.{_nearest(name, options)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PARTS, *_FROM_PARTS})
