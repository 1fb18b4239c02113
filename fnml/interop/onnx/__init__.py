"""ONNX, both ways: model files become trainable pure functions, and functions become files."""

from fnml.interop.onnx._errors import UnsupportedError as UnsupportedError
from fnml.interop.onnx._export import to_onnx as to_onnx
from fnml.interop.onnx._import import OnnxApply as OnnxApply
from fnml.interop.onnx._import import from_onnx as from_onnx
from fnml.interop.onnx._node import Port as Port
