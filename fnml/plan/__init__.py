"""Plan a training step for hardware that is not there: ``fnml.plan(step, state, batch, ...)``."""

import sys
from types import ModuleType
from typing import Any

from fnml.plan._collectives import Collective as Collective
from fnml.plan._collectives import collectives as collectives
from fnml.plan._collectives import wire_bytes as wire_bytes
from fnml.plan._plan import Memory as Memory
from fnml.plan._plan import Plan as Plan
from fnml.plan._plan import plan as plan
from fnml.plan._report import as_bytes as as_bytes
from fnml.plan._report import as_seconds as as_seconds
from fnml.plan._roofline import Roofline as Roofline
from fnml.plan._targets import CHIPS as CHIPS
from fnml.plan._targets import Chip as Chip
from fnml.plan._targets import Target as Target
from fnml.plan._targets import parse_target as parse_target


class _Callable(ModuleType):
    """A package that is called as its one function: ``fnml.plan`` names both."""

    def __call__(self, *args: Any, **options: Any) -> Plan:
        return plan(*args, **options)


sys.modules[__name__].__class__ = _Callable
