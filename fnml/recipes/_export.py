"""Write a run's model as a file that runs without fnml."""

import inspect
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fnml.core import ConfigError, RunError
from fnml.recipes._run import load
from fnml.transforms import merge

# Half precision inside a model keeps two or three digits.
_MOST_DIFFERENCE = 2e-2


class Exported(NamedTuple):
    """A file that was written.

    Attributes:
      path: where it is.
      step: the checkpoint's step.
      inputs: names, dtypes and shapes, as text.
      outputs: the same.
      difference: the norm of its outputs' difference from the model's, relative to theirs.
      checked: what computed its outputs: ``"onnxruntime"``, or ``"from_onnx"`` without it.
    """

    path: Path
    step: int
    inputs: list[str]
    outputs: list[str]
    difference: float
    checked: str


def export_onnx(
    directory: Path,
    path: Path,
    step: int | None = None,
    *,
    opset: int = 21,
    dynamic: str | None = "B, ...",
    constraints: Sequence[str] = (),
    unroll: int = 0,
) -> Exported:
    """Write the model of a run as ONNX, and compare the file with the model on held-out data.

    The file takes the fields of a batch that the recipe's ``predict`` takes. Moving averages are
    constants of the file, parameters its initializers.

    Args:
      directory: the run's.
      path: the file.
      step: the checkpoint's step; by default the newest.
      opset: see :func:`fnml.to_onnx`, as for the following.
      dynamic: symbolic sizes, for all inputs; ``None`` for fixed ones.
      constraints: what is known of them.
      unroll: scans of up to so many turns become straight-line nodes.

    Raises:
      RunError: there is no run in the directory, its recipe has nothing to export, or the file
        computes something else than the model.
      UnsupportedError: the model uses what cannot be exported; all of it is named.
    """
    from fnml.interop.onnx import to_onnx

    loaded = load(directory, step)
    predict = loaded.task.predict
    if predict is None:
        raise RunError(
            f"the recipe of {directory} says nothing to export: its Task needs 'predict'"
        )
    fields = _fields(predict, next(iter(loaded.task.held_out())))
    function = partial(predict, state=loaded.state.model_state)
    # Factors and codes are how a model was trained; what leaves has plain weights.
    params = merge(loaded.task.model, loaded.state.params)
    proto = to_onnx(
        function,
        *fields,
        params=params,
        path=path,
        dynamic=dynamic,
        constraints=constraints,
        opset=opset,
        unroll=unroll,
    )
    expected = [np.asarray(x) for x in jax.tree.leaves(jax.jit(function)(params, *fields))]
    got, checked = _run(path, fields)
    pairs = zip(got, expected, strict=True)
    difference = max((_difference(*pair) for pair in pairs), default=0.0)
    if not difference <= _MOST_DIFFERENCE:
        raise RunError(
            f"{path} computes something else than the model: its outputs differ by {difference:.2g}"
            f" of their norm in {checked}"
        )
    inputs, outputs = (
        list(map(_described, ports)) for ports in (proto.graph.input, proto.graph.output)
    )
    return Exported(path, loaded.step, inputs, outputs, difference, checked)


def _fields(predict: Any, batch: Any) -> list[np.ndarray]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(predict).parameters.values() if p.kind in kinds][1:]
    missing = [name for name in names if name not in batch]
    if missing:
        raise ConfigError(
            f"the recipe's predict takes {', '.join(missing)}, and a batch has {', '.join(batch)}"
        )
    return [np.asarray(batch[name]) for name in names]


def _run(path: Path, fields: list[np.ndarray]) -> tuple[list[np.ndarray], str]:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        from fnml.interop.onnx import from_onnx

        model, params = from_onnx(path)
        out = jax.jit(model.apply)(params, *fields)
        return [np.asarray(x) for x in jax.tree.leaves(out)], "from_onnx"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {port.name: x for port, x in zip(session.get_inputs(), fields, strict=True)}
    return session.run(None, feed), "onnxruntime"


def _difference(got: np.ndarray, expected: np.ndarray) -> float:
    wide = expected.astype(np.float64)
    scale = float(np.linalg.norm(wide)) or 1.0
    return float(np.linalg.norm(got.astype(np.float64) - wide)) / scale


def _described(port: Any) -> str:
    import onnx

    tensor = port.type.tensor_type
    dims = ", ".join(dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim)
    return f"{port.name} {onnx.TensorProto.DataType.Name(tensor.elem_type).lower()}[{dims}]"
