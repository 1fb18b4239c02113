"""Faults that show in a loss's jaxpr, before anything runs."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from fnml.core import leaf_names
from fnml.laws._finding import Finding
from fnml.transforms._flow import flow
from fnml.transforms._sites import source

PyTree = Any
_MIB = 2**20
_BINARY = ("add", "sub", "mul", "div", "max", "min", "eq", "ne", "gt", "lt", "ge", "le", "pow")


def _labelled(params: PyTree, batch: PyTree, closed: Any) -> tuple[list[Any], list[str]]:
    """Label the batch's leaves by their number; return labels of all inputs, and the names."""
    before, names = len(jax.tree.leaves(params)), leaf_names(batch)
    count = len(closed.in_avals)
    own = range(before, before + len(names))
    return [frozenset((i - before,) if i in own else ()) for i in range(count)], names


def unused(closed: Any, params: PyTree, batch: PyTree) -> Finding:
    """Find arrays of the batch that neither loss nor metrics read."""
    given, names = _labelled(params, batch, closed)
    read = frozenset[Any]().union(*flow(closed, given))
    idle = [name or "batch" for i, name in enumerate(names) if i not in read]
    if not idle:
        return Finding("batch field", "held", None, None, "every array of the batch is read")
    meaning = (
        f"{', '.join(idle)}: neither loss nor metrics read it: a mask or weight that was "
        "forgotten, or data that costs loading time"
    )
    return Finding("batch field", "broken", None, None, meaning)


def broadcasts(closed: Any, params: PyTree, batch: PyTree) -> Finding:
    """Find ``[B]`` against ``[B, 1]``: a table of all pairs of examples where a list was meant."""
    given, _ = _labelled(params, batch, closed)
    sizes = {x.shape[0] for x in jax.tree.leaves(batch) if x.ndim}
    found: list[str] = []

    def visit(jaxpr: Any, eqn: Any, labels: list[Any]) -> None:
        if found or eqn.primitive.name not in _BINARY or not all(labels):
            return
        shapes = [_before_broadcast(jaxpr, atom) for atom in eqn.invars]
        out = eqn.outvars[0].aval.shape
        if any(len(shape) != len(out) for shape in shapes):
            return
        left = {i for i, n in enumerate(shapes[0]) if n == 1 and out[i] in sizes and out[i] > 1}
        right = {i for i, n in enumerate(shapes[1]) if n == 1 and out[i] in sizes and out[i] > 1}
        pairs = [(i, j) for i in left - right for j in right - left if out[i] == out[j]]
        if pairs:
            i, j = sorted(pairs[0])
            found.append(
                f"{eqn.primitive.name} at {source(eqn)} makes {list(out)} of shapes "
                f"{list(shapes[0])} and {list(shapes[1])}: every example against every other "
                f"(axes {i} and {j}); give both sides one shape, with reshape or squeeze"
            )

    flow(closed, given, visit)
    if found:
        return Finding("broadcast", "broken", None, None, found[0])
    return Finding("broadcast", "held", None, None, "no pairs of examples are made")


def _before_broadcast(jaxpr: Any, atom: Any) -> tuple[int, ...]:
    """Return an operand's shape with the axes along which it was repeated as 1."""
    if isinstance(atom, jex_core.Literal):
        return ()
    for eqn in jaxpr.eqns:
        if atom in eqn.outvars and eqn.primitive.name == "broadcast_in_dim":
            shape, own = eqn.params["shape"], eqn.invars[0].aval.shape
            kept = dict(zip(eqn.params["broadcast_dimensions"], own, strict=True))
            return tuple(kept.get(i, 1) for i in range(len(shape)))
    return tuple(atom.aval.shape)


def key_use(
    call: Callable[..., Any], closed: Any, params: PyTree, batch: PyTree, key: Any
) -> Finding:
    """Find a key that is given and changes nothing, and keys that are used twice."""
    if key is None:
        meaning = "the example has no key: return (params, batch, key) for a loss that draws"
        return Finding("key", "not applicable", None, None, meaning)
    leaves = len(jax.tree.leaves((params, batch)))
    given = [frozenset(("key",) if i >= leaves else ()) for i in range(len(closed.in_avals))]
    if not any(flow(closed, given)):
        try:
            plain = jax.make_jaxpr(lambda p, b: call(p, b, None))(params, batch)
            same = len(plain.jaxpr.eqns) == len(closed.jaxpr.eqns)
        except Exception:  # noqa: BLE001 (whatever a user's loss raises without a key)
            same = True
        if same:
            meaning = "the loss is given a key and ignores it: no dropout, no noise"
            return Finding("key", "broken", None, None, meaning)
    try:
        with jax.debug_key_reuse(True):
            jax.block_until_ready(jax.jit(lambda *args: call(*args))(params, batch, key))
    except Exception as error:
        if type(error).__name__ != "KeyReuseError":
            raise
        reason = str(error).strip().split("\n")[0]
        meaning = f"a key is used twice, so that two draws are the same numbers: {reason}"
        return Finding("key", "broken", None, None, meaning)
    return Finding("key", "held", None, None, "no key is used twice")


def dtypes(closed: Any, params: PyTree, raw: PyTree) -> Finding:
    """Find float64, integers that wrap or get no gradient, and a narrow loss."""
    faults = [
        f"params/{name}: {x.dtype} gets no gradient: keep it out of the parameters"
        for name, x in zip(leaf_names(params), jax.tree.leaves(params), strict=True)
        if not jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    for name, x in zip(leaf_names(raw), jax.tree.leaves(raw), strict=True):
        dtype = getattr(x, "dtype", None)
        if dtype == np.float64 and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
            faults.append(f"{name or 'batch'}: float64, which JAX narrows: make it float32")
        if dtype in (np.int64, np.uint64) and np.size(x) and _wraps(np.asarray(x)):
            faults.append(f"{name or 'batch'}: {dtype} beyond 32 bits, which JAX cuts off")
    wide = any(x.dtype == jnp.float64 for x in jax.tree.leaves(params))
    count = len(jax.tree.leaves(params))
    given = [frozenset((i,) if i >= count else ()) for i in range(len(closed.in_avals))]

    def visit(jaxpr: Any, eqn: Any, labels: list[Any]) -> None:
        aval = eqn.outvars[0].aval if eqn.outvars else None
        dtype = getattr(aval, "dtype", None)
        if dtype is None or len(faults) > 5:
            return
        if dtype == jnp.float64 and not wide:
            faults.append(f"{eqn.primitive.name} at {source(eqn)} computes in float64")
        small = dtype in (jnp.uint8, jnp.int8, jnp.uint16, jnp.int16)
        if small and eqn.primitive.name in ("add", "sub", "mul") and any(labels):
            faults.append(
                f"{eqn.primitive.name} at {source(eqn)} computes in {dtype}, which wraps: cast to "
                "float32 first"
            )

    flow(closed, given, visit)
    loss = closed.out_avals[0].dtype
    if jnp.finfo(loss).bits < 32:
        faults.append(f"the loss is {loss}: sum it in float32")
    if faults:
        return Finding("dtypes", "broken", None, None, "; ".join(faults))
    return Finding("dtypes", "held", None, None, "no surprise in the dtypes")


def _wraps(x: np.ndarray) -> bool:
    info = np.iinfo(np.int32 if x.dtype.kind == "i" else np.uint32)
    return bool(np.max(x) > info.max or np.min(x) < info.min)


def constants(closed: Any) -> Finding:
    """Find large arrays that the loss closes over, instead of taking them as arguments."""
    large = [
        f"{x.dtype}{list(np.shape(x))} of {math.prod(np.shape(x)) * x.dtype.itemsize / _MIB:.1f} MiB"
        for x in closed.consts
        if hasattr(x, "dtype") and math.prod(np.shape(x)) * x.dtype.itemsize >= _MIB
    ]
    if not large:
        return Finding("constants", "held", None, None, "no array of 1 MiB is baked in")
    meaning = (
        f"{', '.join(large)}: baked into the program, compiled and copied with it, and never "
        "trained: pass it in params or batch"
    )
    return Finding("constants", "broken", None, None, meaning)
