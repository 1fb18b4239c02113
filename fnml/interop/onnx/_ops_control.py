"""Branches and loops: decided while tracing where that is possible, else by JAX's control flow."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnml.core import FnmlError, ShapeError
from fnml.interop.onnx._dtypes import canonical, is_float
from fnml.interop.onnx._node import Graph, Node, Operator
from fnml.interop.onnx._static import axis_of, static, traced, where_is

# Loops of up to so many turns become straight code, which folds and compiles best.
_UNROLLED = 32
# Turns of a loop whose values change their shape, or that tests a condition at each turn.
_MOST_TURNS = 10_000


def _is_concrete(value: Any) -> bool:
    return value is None or not isinstance(value, jax.core.Tracer)


def _arrays(node: Node, values: Any) -> Any:
    """Return values, also those in sequences, as JAX arrays."""
    return tuple(
        list(_arrays(node, v)) if isinstance(v, list) else traced(node, v)[0] for v in values
    )


def _if(node: Node, condition: Any) -> Any:
    branches = [node.attributes[name] for name in ("else_branch", "then_branch")]
    if _is_concrete(condition):
        return node.outer.run(branches[bool(static(node, 0, condition).reshape(()))])

    def runs(graph: Graph) -> Callable[[], Any]:
        return lambda: _arrays(node, node.outer.run(graph))

    ways = [runs(graph) for graph in branches]
    try:
        return _choose(node, condition, ways)
    except FnmlError as error:
        return _choose(node, condition, _that_fit(ways, error))


def _choose(node: Node, condition: Any, ways: list[Callable[[], Any]]) -> Any:
    try:
        return lax.cond(condition.reshape(()), ways[1], ways[0])
    except TypeError as error:
        raise ShapeError(
            f"{where_is(node)}: its branches make outputs of different types, and which one runs is "
            "known only when the model runs. Give the graph's input that decides it as a constant: "
            f"from_onnx(..., static_inputs={{name: value}}); or call apply without jit. {error}"
        ) from error


def _that_fit(ways: list[Callable[[], Any]], reason: FnmlError) -> list[Callable[[], Any]]:
    """Put NaN in the place of a branch that cannot be computed for these sizes.

    Files choose between networks for inputs of different sizes, as for two sampling rates. What
    the other one would make of these sizes is an error, for which a compiled function has NaN.
    """
    shapes: list[Any] = []
    for way in ways:
        try:
            shapes.append(jax.eval_shape(way))
        except FnmlError:
            shapes.append(None)
    fits = next((s for s in shapes if s is not None), None)
    floats = all(is_float(x.dtype) for x in jax.tree.leaves(fits))
    if fits is None or None not in shapes or not floats:
        raise reason

    def poison() -> Any:
        return jax.tree.map(lambda x: jnp.full(x.shape, np.nan, x.dtype), fits)

    return [way if s is not None else poison for way, s in zip(ways, shapes, strict=True)]


class _Unsuited(Exception):
    """A way to run a loop does not fit it; another one is tried."""


def _loop(node: Node, count: Any = None, condition: Any = None, *carried: Any) -> Any:
    known = _is_concrete(count) and _is_concrete(condition)
    limit = None if count is None or not known else int(static(node, 0, count).reshape(()))
    if known and condition is not None and not bool(static(node, 1, condition).reshape(())):
        limit = 0
    sequences = any(isinstance(v, list) or v is None for v in carried)
    ways: list[Callable[[], Any]] = []
    if known:
        ways.append(lambda: _unrolled(node, limit, carried))
    if limit is not None and limit <= 2**31 - 1 and not sequences:
        ways.append(lambda: _scanned(node, limit, carried))
    if not sequences:
        ways.append(lambda: _while(node, count, condition, carried))
    if limit is not None and limit > _UNROLLED:
        ways = [*ways[1:], ways[0]]
    reasons = []
    for way in ways:
        try:
            return way()
        except (_Unsuited, TypeError) as error:
            reasons.append(str(error).strip().split("\n")[0])
    raise ShapeError(f"{where_is(node)}: the loop cannot be traced: {'; '.join(reasons)}")


def _unrolled(node: Node, limit: int | None, carried: tuple[Any, ...]) -> Any:
    body: Graph = node.attributes["body"]
    stacks: list[list[Any]] = [[] for _ in body.outputs[1 + len(carried) :]]
    keep, i, state = np.array(True), 0, carried
    while keep and (limit is None or i < limit):
        if i >= _MOST_TURNS:
            raise _Unsuited(f"more than {_MOST_TURNS} turns one by one")
        out = node.outer.run(body, np.array(i), keep, *state, turn=i)
        if not _is_concrete(out[0]):
            raise _Unsuited("the condition of the next turn is known only when the model runs")
        keep = np.asarray(out[0]).reshape(())
        state = out[1 : 1 + len(carried)]
        for stack, value in zip(stacks, out[1 + len(carried) :], strict=True):
            stack.append(value)
        i += 1
    return (*state, *(_stack(node, stacks, k, carried) for k in range(len(stacks))))


def _stack(node: Node, stacks: list[list[Any]], k: int, carried: tuple[Any, ...]) -> Any:
    values = stacks[k]
    if not values:
        # Without a turn, the body is only asked for the shape that it would make.
        def turn() -> Any:
            ends = (np.array(0), np.array(True))
            return _arrays(node, node.outer.run(node.attributes["body"], *ends, *carried, turn=0))

        shape = jax.eval_shape(turn)[1 + len(carried) + k]
        return np.zeros((0, *shape.shape), shape.dtype)
    if all(isinstance(v, np.ndarray) for v in values):
        return np.stack(values)
    return jnp.stack(traced(node, *values))


def _scanned(node: Node, limit: int, carried: tuple[Any, ...]) -> Any:
    """Run a loop that is never left early."""
    body: Graph = node.attributes["body"]

    def turn(state: Any, i: Any) -> Any:
        out = node.outer.run(body, i, np.array(True), *state, turn=i)
        if not (isinstance(out[0], np.ndarray) and out[0].all()):
            raise _Unsuited("the condition of the next turn is known only when the model runs")
        out = _arrays(node, out[1:])
        return out[: len(state)], out[len(state) :]

    turns = jnp.arange(limit, dtype=canonical(np.int64))
    state, stacks = lax.scan(turn, _arrays(node, carried), turns)
    return (*state, *stacks)


def _while(node: Node, count: Any, condition: Any, carried: tuple[Any, ...]) -> Any:
    body: Graph = node.attributes["body"]
    if len(body.outputs) > 1 + len(carried):
        raise _Unsuited("how many rows its scan outputs have is known only when the model runs")
    dtype = canonical(np.int64)
    top = np.iinfo(dtype).max
    if _is_concrete(count):
        known = top if count is None else min(int(static(node, 0, count).reshape(())), top)
        end = jnp.asarray(known, dtype)
    else:
        known, end = top, count.reshape(()).astype(dtype)
    start = jnp.asarray(True) if condition is None else traced(node, condition)[0].reshape(())

    def turn(state: Any) -> Any:
        i, keep, values = state
        out = _arrays(node, node.outer.run(body, i, keep, *values, turn=i))
        return i + 1, out[0].reshape(()), out[1:]

    def more(state: Any) -> Any:
        return state[1] & (state[0] < end)

    first = (jnp.zeros((), dtype), start, _arrays(node, carried))
    if known > _MOST_TURNS:
        return lax.while_loop(more, turn, first)[2]
    # Of bounded length it can also be differentiated backwards.
    last, _ = lax.scan(
        lambda state, _: (lax.cond(more(state), turn, lambda s: s, state), None),
        first,
        length=known,
    )
    return last[2]


def _scan(node: Node, *inputs: Any) -> Any:
    if node.version < 9:
        return _scan_batched(node, *inputs)
    count = node.attributes["num_scan_inputs"]
    states = _arrays(node, inputs[: len(inputs) - count])
    rows = _arrays(node, inputs[len(inputs) - count :])
    axes = node.attributes.get("scan_input_axes", [0] * count)
    reversed_ = node.attributes.get("scan_input_directions", [0] * count)
    rows = tuple(
        _turned(jnp.moveaxis(x, axis_of(node, axis, x.ndim), 0), back)
        for x, axis, back in zip(rows, axes, reversed_, strict=True)
    )
    states, stacks = _scan_rows(node, states, rows)
    axes = node.attributes.get("scan_output_axes", [0] * len(stacks))
    reversed_ = node.attributes.get("scan_output_directions", [0] * len(stacks))
    stacks = tuple(
        jnp.moveaxis(_turned(y, back), 0, axis_of(node, axis, y.ndim))
        for y, axis, back in zip(stacks, axes, reversed_, strict=True)
    )
    return (*states, *stacks)


def _turned(x: Any, back: int) -> Any:
    return jnp.flip(x, 0) if back else x


def _scan_rows(node: Node, states: Any, rows: Any, length: Any = None) -> Any:
    """Scan the body; past ``length`` the states rest, and the rows are 0."""
    body: Graph = node.attributes["body"]

    def turn(state: Any, row: Any) -> Any:
        i, values = row
        out = _arrays(node, node.outer.run(body, *state, *values, turn=i))
        new, stacked = out[: len(state)], out[len(state) :]
        if length is not None:
            inside = i < length
            new = tuple(jnp.where(inside, a, b) for a, b in zip(new, state, strict=True))
            stacked = tuple(jnp.where(inside, y, jnp.zeros_like(y)) for y in stacked)
        return new, stacked

    turns = jnp.arange(rows[0].shape[0], dtype=jnp.int32)
    return lax.scan(turn, states, (turns, rows))


def _scan_batched(node: Node, lengths: Any, *inputs: Any) -> Any:
    """Scan as opset 8 does: ``[B, ...]`` states, ``[B, T, ...]`` rows."""
    count = node.attributes["num_scan_inputs"]
    backwards = node.attributes.get("directions", [0] * count)
    values = _arrays(node, inputs)
    states, rows = values[: len(values) - count], values[len(values) - count :]
    rows = tuple(jnp.flip(x, 1) if b else x for x, b in zip(rows, backwards, strict=True))
    if lengths is None:
        lengths = np.full(rows[0].shape[0], rows[0].shape[1])
    (lengths,) = traced(node, lengths)

    def one(states: Any, rows: Any, length: Any) -> Any:
        return _scan_rows(node, states, rows, length.astype(jnp.int32))

    states, stacks = jax.vmap(one)(states, rows, lengths)
    return (*states, *stacks)


OPERATORS: Mapping[str, Operator] = {"If": _if, "Loop": _loop, "Scan": _scan}
SHAPE_INPUTS = {"If": (0,), "Loop": (0, 1)}
