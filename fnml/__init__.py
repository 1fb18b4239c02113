"""Functional AI training on JAX: pure functions over parameter trees, and transforms with laws."""


from fnml.core import Mean as Mean
from fnml.core import Metrics as Metrics
from fnml.core import Model as Model
from fnml.core import Param as Param
from fnml.core import State as State
from fnml.core import abstract as abstract
from fnml.core import count as count
from fnml.core import init as init

__version__ = "0.1.0"
