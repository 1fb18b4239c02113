"""Where a run's rows go: files, dashboards and the terminal.

Each member is a :class:`fnml.core.Sink`. Those that keep rows take ``after``, the step from which
a run continues, and then hold every row exactly once, however often the run was killed.
"""

from fnml.sinks._console import Console as Console
from fnml.sinks._csv import Csv as Csv
from fnml.sinks._jsonl import Jsonl as Jsonl
from fnml.sinks._jsonl import read_jsonl as read_jsonl
from fnml.sinks._prometheus import Prometheus as Prometheus
from fnml.sinks._tee import tee as tee
from fnml.sinks._tensorboard import TensorBoard as TensorBoard
