"""Functions as ONNX files."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fnml.core import ConfigError, Model, leaf_names, require
from fnml.interop.onnx._errors import UnsupportedError
from fnml.interop.onnx._inputs import abstract_args, argument_names
from fnml.interop.onnx._names import PARAMETERS

PyTree = Any
FIRST_OPSET, DEFAULT_OPSET = 18, 21


def to_onnx(
    fn: Callable[..., PyTree] | Model,
    *args: Any,
    params: PyTree = None,
    path: str | Path | None = None,
    dynamic: Any = None,
    constraints: Sequence[str] = (),
    opset: int = DEFAULT_OPSET,
    unroll: int = 0,
    external_data: bool | None = None,
) -> Any:
    """Write ``fn(params, *args)``, or ``fn(*args)`` without parameters, as an ONNX model.

    The function is traced once, with shapes only, and its jaxpr is written operation by operation;
    nothing is patched and nothing runs. So gradients and whole train steps are exported like any
    other function. Inputs are named by argument and path (``tokens``, ``cache/key``), outputs
    ``output`` or ``output/<path>``, parameters by path (``layers/mlp/kernel``). Random keys are
    inputs of their data, uint32 ``[..., 2]``, and random bits are those of JAX. Kernels with an
    implementation for each platform are written in their default form.

    Law: ``from_onnx(to_onnx(f, *args, params=p))`` is a function like ``f``, and ``p``, as nested
    dicts, bit for bit.

    Args:
      fn: a function of arrays in any pytrees, or a Model for its ``apply``.
      *args: arrays or ``jax.ShapeDtypeStruct``, in any pytrees; only shapes and dtypes count.
      params: what becomes initializers; any pytree of arrays. Without it all is input.
      path: a file to write, whole or not at all.
      dynamic: symbolic sizes as :func:`jax.export.symbolic_shape` reads them: by input name,
        ``{"tokens": "B, T"}``, or as a prefix of the arguments' tree. ``"B, ..."`` leaves the
        other axes as they are.
      constraints: what is known of symbolic sizes, such as ``"T <= 128"``.
      opset: the version of ONNX's operators, 18 or higher.
      unroll: a scan of up to so many turns is written as straight-line nodes instead of a Scan:
        for runtimes that have none, or are faster without.
      external_data: whether arrays go to ``<path>.data``; by default those of more than 2 GiB.

    Returns:
      the ``onnx.ModelProto``; it has passed ONNX's checker.

    Raises:
      UnsupportedError: the function uses what cannot be exported; all of it is listed, each with
        the line of the user's code, and no file is written.
      ConfigError: the opset, ``dynamic`` or the parameters cannot be used.

    >>> import jax.numpy as jnp
    >>> w = {"w": jnp.ones((3, 2))}
    >>> model = to_onnx(lambda p, x: jnp.tanh(x @ p["w"]), jnp.ones((4, 3)), params=w)
    >>> [node.op_type for node in model.graph.node]
    ['MatMul', 'Tanh']
    >>> model.graph.initializer[0].name, model.graph.input[0].name, model.graph.output[0].name
    ('w', 'x', 'output')
    """
    onnx = require("onnx", extra="onnx")
    newest = onnx.defs.onnx_opset_version()
    if not FIRST_OPSET <= opset <= newest:
        raise ConfigError(f"opset={opset}: expected {FIRST_OPSET} to {newest}")
    function = fn.apply if isinstance(fn, Model) else fn
    weights = _weights(params)
    skip = int(params is not None)
    names = argument_names(function, args, skip)
    inputs = abstract_args(args, names, dynamic, constraints)
    closed, outputs = _traced(function, (params, *inputs) if skip else inputs)
    model = _built(onnx, closed, weights, names, outputs, opset, unroll)
    model.graph.name = getattr(function, "__name__", type(function).__name__)
    if path is not None:
        from fnml.interop.onnx._write import write_model

        write_model(model, Path(path), external_data)
    return model


def _weights(params: PyTree) -> dict[str, np.ndarray]:
    from fnml.interop.onnx._inline import host

    leaves = dict(zip(leaf_names(params), jax.tree.leaves(params), strict=True))
    faults = [
        f"{name or 'params'}: expected an array, got {type(leaf).__name__}"
        for name, leaf in leaves.items()
        if isinstance(leaf, jax.ShapeDtypeStruct) or not hasattr(leaf, "dtype")
    ]
    if faults:
        raise ConfigError("parameters are written into the file:\n" + "\n".join(faults))
    return {name or "params": host(leaf) for name, leaf in leaves.items()}


def _traced(function: Callable[..., PyTree], args: tuple[Any, ...]) -> tuple[Any, list[str]]:
    """Return the jaxpr of a function and the names of its outputs."""
    from fnml.transforms._walk import trace

    try:
        traced = trace(function, args, {})
    except jax.errors.InconclusiveDimensionOperation as error:
        raise UnsupportedError(
            "the function decides by a symbolic size, so it cannot be exported with it: give "
            f"'constraints' that settle it, or leave that size fixed. JAX says: {error}"
        ) from error
    names = [f"output/{name}" if name else "output" for name in leaf_names(traced.shapes)]
    return traced.closed, names


def _built(
    onnx: Any,
    closed: Any,
    weights: Mapping[str, np.ndarray],
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int,
    unroll: int,
) -> Any:
    from fnml.interop.onnx._builder import Builder, Refused, info, physical
    from fnml.interop.onnx._finish import finish
    from fnml.interop.onnx._inline import inline
    from fnml.interop.onnx._lowerings import LOWERINGS

    g = Builder(opset, LOWERINGS, unroll)
    reserved = [g.name(name) for name in outputs]
    own = [g.declare(g.name(name), array.dtype) for name, array in weights.items()]
    ports = []
    try:
        for name, aval in zip(inputs, closed.in_avals[len(own) :], strict=True):
            shape, dtype = physical(aval)
            ports.append(info(g.declare(g.name(name), dtype, shape), dtype, shape))
    except Refused as refusal:
        raise UnsupportedError(f"the input {name} cannot be exported: {refusal}") from refusal
    results = inline(g, closed, [*own, *(port.name for port in ports)])
    if g.refusals:
        listed = "\n".join(f"  {line}" for line in dict.fromkeys(g.refusals))
        raise UnsupportedError(f"the function uses what to_onnx cannot export:\n{listed}")
    shapes = [physical(aval)[0] for aval in closed.out_avals]
    model = finish(
        g, dict(zip(own, weights.values(), strict=True)), ports, results, reserved, shapes
    )
    model.producer_name = "fnml"
    model.metadata_props.add(key=PARAMETERS, value=json.dumps(own))
    return model
