"""Guests: models written for other libraries, as fnml models."""

from fnml.interop._linen import from_linen as from_linen
from fnml.interop._linen import to_linen_variables as to_linen_variables
from fnml.interop._nnx import from_nnx as from_nnx
from fnml.interop._nnx import into_nnx as into_nnx
from fnml.interop.onnx import from_onnx as from_onnx
from fnml.interop.onnx import to_onnx as to_onnx
