"""The ONNX backend suite: its cases, how one is run, and what is listed as not supported.

Inputs from which shapes are computed, or which decide a branch or a loop's length, are given as
``static_inputs``: those that ``shape_names`` finds, so that every case is one that can be compiled.
Each case is compiled, and compared; one whose outputs are strings, which no compiled function returns,
or float16, whose tolerance is one rounding, is run operation by operation.
"""

import collections
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests

from fnml.interop.onnx import from_onnx
from fnml.interop.onnx._names import shape_names
from fnml.interop.onnx._operators import OPERATORS, SHAPE_INPUTS

# Most of the time goes into compiling small programs.
_CHEAP = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
KINDS = ("node", "simple", "real", "pytorch-converted", "pytorch-operator")
LISTED = Path(__file__).with_name("onnx_backend_not_supported.json")


class Case(NamedTuple):
    """One case: a model, and pairs of inputs and expected outputs."""

    name: str
    kind: str
    model: Any
    data: Sequence[tuple[Sequence[Any], Sequence[Any]]]
    rtol: float
    atol: float


def is_core(case: Case) -> bool:
    """Tell whether a case speaks of ai.onnx alone."""
    return {o.domain for o in case.model.opset_import} <= {"", "ai.onnx"}


def is_expanded(case: Case) -> bool:
    """Tell whether the case is another one with its operator replaced by its definition."""
    return "_expanded" in case.name


def cases(kind: str) -> Iterator[Case]:
    """Return the cases of a kind, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sorted(load_model_tests(kind=kind), key=lambda case: case.name)
    for case in found:
        if case.model is not None:
            yield Case(case.name, kind, case.model, case.data_sets, case.rtol, case.atol)
        else:
            path, data = _files(case)
            yield Case(case.name, kind, onnx.load(path), data, case.rtol, case.atol)


def _files(case: Any) -> tuple[Path, list[Any]]:
    if case.model_dir is not None:
        folder = Path(case.model_dir)
        path = folder / "model.onnx"
        graph = onnx.load(path).graph
        sets = [
            (_load(graph.input, data, "input"), _load(graph.output, data, "output"))
            for data in sorted(folder.glob("test_data_set_*"))
        ]
        return path, sets
    path = Path(onnx.__file__).parents[1] / case.url
    model = onnx.load(path)
    own = {t.name for t in model.graph.initializer}
    inputs = [_ramp(port) for port in model.graph.input if port.name not in own]
    outputs = [
        numpy_helper.to_array(onnx.load_tensor(str(path)[: -len(".onnx")] + f"_output_{i}.pb"))
        for i in range(len(model.graph.output))
    ]
    return path, [(inputs, outputs)]


def _ramp(port: Any) -> np.ndarray:
    """Return the input with which the suite's light models were run."""
    shape = tuple(d.dim_value or 1 for d in port.type.tensor_type.shape.dim)
    size = int(np.prod(shape))
    return (np.arange(size).reshape(shape) / size).astype(np.float32)


def _load(ports: Any, folder: Path, name: str) -> list[Any]:
    found = []
    for i, port in enumerate(ports):
        path = folder / f"{name}_{i}.pb"
        if not path.exists():
            break
        kind = port.type.WhichOneof("value")
        proto = {
            "sequence_type": onnx.SequenceProto,
            "optional_type": onnx.OptionalProto,
        }.get(kind, onnx.TensorProto)()
        proto.ParseFromString(path.read_bytes())
        found.append(_value(proto))
    return found


def _value(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, onnx.SequenceProto):
        return numpy_helper.to_list(value)
    if isinstance(value, onnx.OptionalProto):
        return numpy_helper.to_optional(value)
    if isinstance(value, list | tuple):
        return [_value(v) for v in value]
    return value if value is None else np.asarray(value)


def baked(model: Any) -> frozenset[str]:
    """Return the graph inputs that are given as ``static_inputs``."""
    return shape_names(model.graph.node)


def run(case: Case, compiled: bool = True) -> None:
    """Run a case under 64 bit and compare; what fails raises.

    The tolerances are the case's, for bfloat16 two units in the last place, as in the suite.
    """
    names = [p.name for p in case.model.graph.input]
    own = {t.name for t in case.model.graph.initializer}
    names = [name for name in names if name not in own]
    fixed = baked(case.model)
    for inputs, expected in case.data:
        given = dict(zip(names, map(_value, inputs), strict=False))
        static = {n: v for n, v in given.items() if n in fixed or not _is_numeric(v)}
        with jax.enable_x64(True):
            model, params = from_onnx(case.model, static)
            rest = [v for n, v in given.items() if n not in static]
            whole = compiled and all(map(_compiles, map(_value, expected)))
            apply = jax.jit(model.apply, compiler_options=_CHEAP) if whole else model.apply
            got = apply(params, *rest)
        _compare(_several(got, len(case.model.graph.output)), expected, case)


def _is_numeric(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(v is None or v.dtype.kind not in "OSU" for v in values)


def _compiles(value: Any) -> bool:
    """Tell whether an output is no string, and no float16: XLA would round fused ones only once."""
    return _is_numeric(value) and getattr(value, "dtype", None) != np.float16


def _several(got: Any, count: int) -> tuple[Any, ...]:
    return got if count > 1 and isinstance(got, tuple) else (got,)


def _compare(got: Sequence[Any], expected: Sequence[Any], case: Case) -> None:
    assert len(got) == len(expected), f"{len(got)} outputs instead of {len(expected)}"
    for ours, theirs in zip(got, map(_value, expected), strict=True):
        if theirs is None or isinstance(theirs, list):
            assert type(ours) is type(theirs), f"{type(ours)} instead of {type(theirs)}"
            if theirs is not None:
                _compare(ours, theirs, case)
            continue
        ours = np.asarray(ours)
        assert ours.shape == theirs.shape, f"shape {ours.shape} instead of {theirs.shape}"
        if theirs.dtype.kind in "OSU":
            assert (ours.astype(object) == theirs.astype(object)).all()
            continue
        assert ours.dtype == theirs.dtype, f"dtype {ours.dtype} instead of {theirs.dtype}"
        rtol = case.rtol
        if ours.dtype.name == "bfloat16":
            rtol = max(rtol, 2**-6)
        if ours.dtype.kind == "V" or ours.dtype.name not in np.sctypeDict:
            ours, theirs = ours.astype(np.float32), theirs.astype(np.float32)
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=case.atol)


def table() -> str:
    """Return the table of operators: how many of the suite's cases of each one pass."""
    passed: collections.Counter[str] = collections.Counter()
    total: collections.Counter[str] = collections.Counter()
    lost = listed()["node"]
    for case in cases("node"):
        if is_expanded(case):
            continue
        operators = {
            f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            for node in case.model.graph.node
        }
        total.update(operators)
        passed.update(operators if case.name not in lost else ())
    defined = {
        schema.name
        for schema in onnx.defs.get_all_schemas()
        if not schema.domain
        and not schema.deprecated
        and (schema.has_function or schema.has_context_dependent_function)
    }
    rows = ["| operator | cases passed | known at trace time |", "|---|---|---|"]
    for name in sorted({*OPERATORS, *defined, *total}, key=str.lower):
        cell = f"{passed[name]} of {total[name]}" if total[name] else "no case"
        if name not in OPERATORS and name != "Constant":
            cell += ", as ONNX defines it" if name in defined else ", not supported"
        places = ", ".join(_input_names(name)) if name in SHAPE_INPUTS else ""
        rows.append(f"| `{name}` | {cell} | {places} |")
    return "\n".join(rows)


def _input_names(name: str) -> list[str]:
    """Return how ONNX calls the inputs of an operator that decide a shape or a structure."""
    inputs = onnx.defs.get_schema(name).inputs
    return [f"`{inputs[i].name}`" for i in SHAPE_INPUTS[name] if i < len(inputs)]


def listed() -> dict[str, dict[str, str]]:
    """Return the cases that are not supported, with the reason, by kind."""
    return json.loads(LISTED.read_text())
