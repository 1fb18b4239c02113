"""Save the state of a run, and read it back with the same bits or a named error."""

from fnml.checkpoint._checkpointer import Checkpointer as Checkpointer
from fnml.checkpoint._hash import tree_sha256 as tree_sha256
from fnml.checkpoint._names import WeightRule as WeightRule
from fnml.checkpoint._names import export_weights as export_weights
from fnml.checkpoint._names import import_weights as import_weights
from fnml.checkpoint._npz import load_npz as load_npz
from fnml.checkpoint._npz import save_npz as save_npz
from fnml.checkpoint._restore import Restored as Restored
from fnml.checkpoint._restore import restore as restore
from fnml.checkpoint._restore import restore_meta as restore_meta
from fnml.checkpoint._safetensors import load_safetensors as load_safetensors
from fnml.checkpoint._safetensors import save_safetensors as save_safetensors
from fnml.checkpoint._torch import load_torch as load_torch
from fnml.checkpoint._torch import save_torch as save_torch
from fnml.checkpoint._verify import Fault as Fault
from fnml.checkpoint._verify import verify as verify
