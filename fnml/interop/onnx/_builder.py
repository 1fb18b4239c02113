"""Build an ONNX graph node by node: names, constants, dtypes, shapes, subgraphs."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import onnx

from fnml.interop.onnx._dtypes import DTYPES
from fnml.interop.onnx._shapes import Size, all_static, evaluate, expression, is_static, label
from fnml.interop.onnx._support import computed_in

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_COMPARISONS = frozenset(
    ["Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "IsNaN", "IsInf"]
)
_COUNTS = frozenset(["Shape", "Size", "ArgMax", "ArgMin"])
_UNUSUAL = re.compile(r"[^\w/.-]+")
Input = Any
Lowering = Callable[..., Any]


class Refused(Exception):
    """Raised by a lowering: why an equation cannot be exported."""


class Port(NamedTuple):
    """An input or output of a graph: name, dtype and shape."""

    name: str
    dtype: Any
    shape: Sequence[Any]


class Place(NamedTuple):
    """What is being written.

    Attributes:
      scope: the named scopes around the equation, each followed by a slash.
      shape: of the equation's first result.
      origins: the equations around it and itself, as far as they come from the user's code.
      fixed: whether those inside do not.
    """

    scope: str
    shape: tuple[Any, ...]
    origins: tuple[Any, ...]
    fixed: bool


class _Scope:
    """A graph that is being built: its nodes, and which computations they already hold."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.seen: dict[Any, list[str]] = {}


def code_of(dtype: Any) -> int:
    """Return the number that ONNX has for a dtype.

    Raises:
      Refused: it has none.
    """
    found = _CODES.get(np.dtype(dtype))
    if found is None:
        raise Refused(f"ONNX has no dtype {np.dtype(dtype)}")
    return found


def physical(aval: Any) -> tuple[tuple[Any, ...], np.dtype[Any]]:
    """Return shape and dtype of what a value is kept in: a key is uint32 with one axis more."""
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), aval.dtype))
        return (*aval.shape, *data.shape), np.dtype(np.uint32)
    if jnp.issubdtype(aval.dtype, jax.dtypes.extended) or aval.dtype == jax.dtypes.float0:
        raise Refused(f"values of dtype {aval.dtype} have no counterpart in ONNX")
    return tuple(aval.shape), np.dtype(aval.dtype)


class Builder:
    """The state of one export. Call it with an operator and its inputs to add a node.

    An input is the name of a value, an array (a constant), a Python number (a constant in the
    dtype of the other inputs) or ``None`` (left out). Nodes are shared: what an enclosing graph has
    computed already is not computed again.

    Args:
      opset: the version of ai.onnx to write for.
      lowerings: how each primitive is written, by name.
      unroll: a scan of up to so many turns becomes straight-line nodes.
    """

    def __init__(self, opset: int, lowerings: Mapping[str, Lowering], unroll: int = 0) -> None:
        self.opset, self.lowerings, self.unroll = opset, lowerings, unroll
        self.dtypes: dict[str, np.dtype[Any]] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.narrow: dict[str, str] = {}
        self.shapes: dict[str, tuple[Any, ...]] = {}
        self.refusals: list[str] = []
        self.place = Place("", (), (), False)
        self._scopes = [_Scope()]
        self._symbols: dict[str, tuple[str, int]] = {}
        self._known: dict[Any, str] = {}
        self._taken: dict[str, int] = {}

    def name(self, hint: str) -> str:
        """Return a name that no value has yet: the hint, with a number if it is taken."""
        while hint in self._taken:
            self._taken[hint] += 1
            hint = f"{hint}_{self._taken[hint]}"
        self._taken[hint] = 0
        return hint

    def declare(self, name: str, dtype: Any, shape: Sequence[Any] = ()) -> str:
        """Make known a value that no node computes; its axes tell the sizes of their symbols."""
        self.dtypes[name] = np.dtype(dtype)
        for axis, dim in enumerate(shape):
            if not is_static(dim):
                self._symbols.setdefault(str(dim), (name, axis))
        return name

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        """The nodes of the outermost graph, in an order in which they can run."""
        return self._scopes[0].nodes

    def constant(self, value: Any, dtype: Any = None) -> str:
        """Return the name of a constant; equal ones are kept once."""
        array = np.ascontiguousarray(np.asarray(value, dtype))
        array = array.reshape(np.shape(value))
        key = (array.dtype, array.shape, array.tobytes())
        if key not in self._known:
            self._known[key] = self.declare(self.name("constant"), array.dtype)
            self.constants[self._known[key]] = array
        return self._known[key]

    def __call__(
        self, op: str, *inputs: Input, dtype: Any = None, count: int = 1, **attributes: Any
    ) -> Any:
        """Add a node and return the name of its output; a list of names if ``count`` is not 1.

        Args:
          op: the operator.
          *inputs: names, arrays, numbers or ``None``.
          dtype: of the outputs, where the operator's rule would not give it; a sequence for each.
          count: how many outputs it has.
          **attributes: the operator's; those that are ``None`` are left out.
        """
        main = self._main(op, inputs)
        names = [self._input(x, main) for x in inputs]
        given = {k: v for k, v in attributes.items() if v is not None}
        result = main if dtype is None else dtype
        if op == "Cast":
            result = dtype
        elif dtype is None and op in _COMPARISONS:
            result = np.dtype(bool)
        elif dtype is None and op in _COUNTS:
            result = np.dtype(np.int64)
        if main is not None and (wide := computed_in(op, main)) != main:
            first = int(op == "Where")
            names[first:] = [
                self.cast(x, wide) if x and self.dtypes[x] == main else x for x in names[first:]
            ]
            results = result if isinstance(result, tuple) else (result,) * count
            fixed = dtype is None and op in _COMPARISONS
            inner = tuple(wide if r == main and not fixed else r for r in results)
            out = self._add(op, names, inner, given)
            out = [self.cast(x, r) for x, r in zip(out, results, strict=True)]
        else:
            out = self._add(
                op, names, result if isinstance(result, tuple) else (result,) * count, given
            )
        return out[0] if count == 1 else out

    def _main(self, op: str, inputs: Sequence[Input]) -> np.dtype[Any] | None:
        data = inputs[1:] if op == "Where" else inputs
        for kind in (str, np.ndarray | np.generic):
            for x in data:
                if isinstance(x, kind):
                    return self.dtypes[x] if isinstance(x, str) else x.dtype
        return None

    def _input(self, x: Input, main: Any) -> str:
        if x is None:
            return ""
        if isinstance(x, str):
            return x
        return self.constant(x if isinstance(x, np.ndarray | np.generic) else np.array(x, main))

    def _add(
        self, op: str, names: list[str], dtypes: tuple[Any, ...], attributes: dict[str, Any]
    ) -> list[str]:
        key = None
        if not any(isinstance(v, onnx.GraphProto) for v in attributes.values()):
            shown = tuple(sorted((k, repr(v)) for k, v in attributes.items()))
            key = (op, tuple(names), dtypes, shown)
            for scope in self._scopes:
                if key in scope.seen:
                    return scope.seen[key]
        hint = _UNUSUAL.sub("_", f"{self.place.scope}{op.lower()}")
        outputs = [self.name(hint) for _ in dtypes]
        node = onnx.helper.make_node(op, names, outputs, name=outputs[0], **attributes)
        self._scopes[-1].nodes.append(node)
        for name, dtype in zip(outputs, dtypes, strict=True):
            self.declare(name, dtype)
        if key is not None:
            self._scopes[-1].seen[key] = outputs
        return outputs

    def cast(self, x: str, dtype: Any) -> str:
        """Return ``x`` in another dtype."""
        if self.dtypes[x] == dtype:
            return x
        if x in self.constants and self.constants[x].size <= 64:
            with np.errstate(all="ignore"):
                return self.constant(self.constants[x].astype(dtype))
        return self("Cast", x, dtype=np.dtype(dtype), to=code_of(dtype))

    def axes(self, *axes: int) -> np.ndarray:
        """Return axes, or any small numbers, as the int64 vector that operators take."""
        return np.array(axes, np.int64).reshape(-1)

    def size(self, dim: Any) -> Size:
        """Return a dimension as a number, or as the name of an int64 ``[1]`` tensor."""
        if is_static(dim):
            return int(dim)
        with self._outermost():
            return evaluate(expression(dim), self._symbol, self)

    def _symbol(self, symbol: str) -> str:
        if symbol not in self._symbols:
            raise Refused(f"the size {symbol} is no input's")
        name, axis = self._symbols[symbol]
        return self("Shape", name, start=axis, end=axis + 1)

    def vector(self, dims: Sequence[Any]) -> str:
        """Return dimensions as an int64 vector, computed once if some are symbolic."""
        if all_static(dims):
            return self.constant(self.axes(*(int(d) for d in dims)))
        parts: list[Any] = []
        for size in map(self.size, dims):
            if isinstance(size, int) and parts and isinstance(parts[-1], list):
                parts[-1].append(size)
            else:
                parts.append([size] if isinstance(size, int) else size)
        with self._outermost():
            pieces = [self.axes(*p) if isinstance(p, list) else p for p in parts]
            return self("Concat", *pieces, axis=0) if len(pieces) > 1 else str(parts[0])

    def reshape(self, x: str, old: Sequence[Any], new: Sequence[Any]) -> str:
        """Return ``x`` of shape ``old`` with shape ``new``."""
        old, new = tuple(old), tuple(new)
        if old == new:
            return x
        if all_static(new):
            empty = 1 if 0 in new else None
            return self("Reshape", x, self.axes(*map(int, new)), allowzero=empty)
        # 0 keeps a size and -1 stands for the one that is left: no arithmetic at run time.
        wanted = [
            int(d) if is_static(d) else 0 if i < len(old) and old[i] == d else -1
            for i, d in enumerate(new)
        ]
        if wanted.count(-1) > 1 or any(is_static(d) and d == 0 for d in new):
            return self("Reshape", x, self.vector(new), allowzero=1)
        return self("Reshape", x, self.axes(*wanted))

    def expand(self, x: str, old: Sequence[Any], new: Sequence[Any]) -> str:
        """Return ``x`` broadcast from shape ``old``, its last axes the last of ``new``, to that."""
        old, new = tuple(old), tuple(new)
        if old == new:
            return x
        aligned = (1,) * (len(new) - len(old)) + old
        # Where nothing changes, 1 keeps the size.
        out = self(
            "Expand",
            x,
            self.vector([1 if o == n else n for o, n in zip(aligned, new, strict=True)]),
        )
        self.narrow[out] = self.narrow.get(x, x)
        return out

    def unsqueeze(self, x: str, axes: Sequence[int], rank: int) -> str:
        """Return ``x`` of a known rank with axes of size 1 put in."""
        if not axes:
            return x
        if rank == 1 and self.dtypes[x].kind in "iu":
            # ONNX's data propagation takes every vector of integers for a shape, also one that an
            # Unsqueeze made a matrix of, and then refuses to add it to another.
            kept = [1] * (rank + len(axes))
            [place] = [i for i in range(len(kept)) if i not in axes]
            kept[place] = -1
            return self("Reshape", x, self.axes(*kept))
        return self("Unsqueeze", x, self.axes(*axes))

    def transpose(self, x: str, order: Sequence[int]) -> str:
        """Return ``x`` with its axes in another order."""
        order = [int(i) for i in order]
        return x if order == sorted(order) else self("Transpose", x, perm=order)

    def elementwise(self, op: str, *inputs: Input, **attributes: Any) -> str:
        """Add a node that broadcasts: operands that were expanded before are read as they were."""
        names = [x for x in inputs if isinstance(x, str)]
        if any(x not in self.narrow and self.shapes.get(x) == self.place.shape for x in names):
            inputs = tuple(self.narrow.get(x, x) if isinstance(x, str) else x for x in inputs)
        return self(op, *inputs, **attributes)

    @contextlib.contextmanager
    def _outermost(self) -> Iterator[None]:
        """Let nodes go to the outermost graph, whose inputs tell the symbolic sizes."""
        inner, self._scopes = self._scopes, self._scopes[:1]
        try:
            yield
        finally:
            self._scopes = inner

    def subgraph(
        self,
        inputs: Sequence[Port],
        body: Callable[..., Sequence[str]],
        shapes: Sequence[Any] | None = None,
    ) -> onnx.GraphProto:
        """Build a graph for a node's attribute; it sees all values around it.

        Args:
          inputs: what it takes.
          body: ``body(*names) -> names``, which adds the nodes.
          shapes: of the outputs, where they are known.
        """
        self._scopes.append(_Scope())
        names = [self.declare(self.name(port.name), port.dtype) for port in inputs]
        own = set(names)
        try:
            results = list(body(*names))
            made = {out for node in self._scopes[-1].nodes for out in node.output}
            outputs: list[str] = []
            for result in results:
                # An output has to be computed here, and once.
                fresh = result in made and result not in outputs and result not in own
                outputs.append(result if fresh else self._copy(result))
            nodes = prune(self._scopes[-1].nodes, outputs)
        finally:
            self._scopes.pop()
        shapes = [None] * len(outputs) if shapes is None else shapes
        return onnx.helper.make_graph(
            nodes,
            self.name("body"),
            [info(n, p.dtype, p.shape) for n, p in zip(names, inputs, strict=True)],
            [info(n, self.dtypes[n], s) for n, s in zip(outputs, shapes, strict=True)],
        )

    def _copy(self, x: str) -> str:
        return self.rename(x, self.name("copy"))

    def rename(self, x: str, name: str) -> str:
        """Give a value another name, by a node."""
        self._scopes[-1].nodes.append(onnx.helper.make_node("Identity", [x], [name], name=name))
        return self.declare(name, self.dtypes[x])


def info(name: str, dtype: Any, shape: Sequence[Any] | None) -> onnx.ValueInfoProto:
    """Describe a value, with symbolic dimensions by name."""
    dims = None if shape is None else [label(d) for d in shape]
    return onnx.helper.make_tensor_value_info(name, code_of(dtype), dims)


def prune(nodes: list[onnx.NodeProto], outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """Drop the nodes that no output depends on."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if any(out in needed for out in node.output):
            kept.append(node)
            needed.update(reads(node))
    return kept[::-1]


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield every name that a node reads, in its subgraphs too."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.HasField("g"):
            for inner in attribute.g.node:
                yield from reads(inner)
            yield from (out.name for out in attribute.g.output)


def elements(shape: Sequence[Any]) -> Any:
    """Return how many elements a shape has, symbolic if a dimension is."""
    return math.prod(shape)
