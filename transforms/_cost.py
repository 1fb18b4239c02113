"""Count what a function will compute and move, block by block, before anything runs."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from fnml.transforms._platform import chosen_platform, possible
from fnml.transforms._sites import functions, joined, last_reads, scopes, within
from fnml.transforms._walk import bodies, trace

PyTree = Any

# As XLA's cost analysis has it, a function of this list is no FLOP.
_TRANSCENDENTAL = frozenset(
    (
        *("exp", "exp2", "expm1", "log", "log1p", "logistic", "tanh", "sin", "cos", "tan", "pow"),
        *("sqrt", "rsqrt", "cbrt", "erf", "erf_inv", "erfc", "atan2", "digamma", "lgamma"),
    )
)
_ELEMENTWISE = frozenset(
    (
        *("add", "sub", "mul", "div", "rem", "max", "min", "neg", "abs", "sign", "floor", "ceil"),
        *("round", "add_any", "and", "or", "xor", "not", "eq", "ne", "lt", "le", "gt", "ge"),
        *("select_n", "clamp", "square", "is_finite", "shift_left", "shift_right_logical"),
        *("shift_right_arithmetic", "nextafter", "population_count", "clz"),
    )
)
_FREE = frozenset(
    (
        *("reshape", "squeeze", "expand_dims", "broadcast_in_dim", "name", "stop_gradient", "iota"),
        "platform_index",
    )
)


class Block(NamedTuple):
    """What the equations of one named block cost.

    Attributes:
      name: the scopes around them, or else the functions of the user's code.
      flops: floating-point operations, of matrix products and convolutions and all others.
      products: those of matrix products and convolutions alone.
      transcendentals: evaluations of exp, log, tanh and their like.
      bytes: what the equations read and write if none is fused with another.
    """

    name: str
    flops: float = 0.0
    products: float = 0.0
    transcendentals: float = 0.0
    bytes: float = 0.0

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class Cost:
    """What a function costs; made by :func:`cost`.

    Attributes:
      blocks: by name, the most FLOPs first.
      total: their sum.
      arguments: bytes of the arguments.
      peak: bytes alive at the same time at most, arguments included, if every equation's result
        is stored: an estimate. A compiler fuses, which needs less, and may want scratch space for
        convolutions, which is not in here.
      unbounded: whether a ``while`` was counted as one turn.
    """

    blocks: tuple[Block, ...]
    total: Block
    arguments: int
    peak: int
    unbounded: bool

    def table(self) -> Any:
        """Return a ``rich`` table, to be printed with ``rich.print``."""
        from rich.table import Table

        table = Table("block", "GFLOP", "share", "products", "GiB moved", "FLOP/byte")
        for block in (*self.blocks, self.total):
            share = block.flops / self.total.flops if self.total.flops else 0.0
            part = block.products / block.flops if block.flops else 0.0
            cells = (f"{block.flops / 1e9:.4g}", f"{share:.1%}", f"{part:.1%}")
            moved = (f"{block.bytes / 2**30:.4g}", f"{block.intensity:.3g}")
            table.add_row(block.name, *cells, *moved)
        peak = f"about {self.peak / 2**20:.1f} MiB alive at most, of which arguments "
        table.caption = peak + f"{self.arguments / 2**20:.1f} MiB"
        if self.unbounded:
            table.caption += "; a while loop is counted as one turn"
        return table


def cost(
    function: Callable[..., PyTree],
    *args: Any,
    depth: int = 3,
    platform: str | None = None,
    **options: Any,
) -> Cost:
    """Count FLOPs, bytes and memory of a function, by named block; nothing is compiled or run.

    Arguments may be abstract (:func:`fnml.core.abstract`, ``jax.ShapeDtypeStruct``). The body of
    a scan counts once per turn, where XLA's own analysis counts a loop's body once; of a
    ``cond`` the dearest branch counts, of a ``while`` one turn. A convolution's products with
    its padding do not count, as in XLA. Of branches by platform (``lax.platform_dependent``: the
    kernels, convolutions) the one for ``platform`` counts. A Pallas kernel counts as it states;
    one that states nothing counts as the default branch beside it, and as nothing where it has
    none.

    Args:
      function: any function of arrays, such as a loss or its gradient.
      *args: its arguments, arrays or abstract.
      depth: how many segments a block's name has at most.
      platform: "cpu", "cuda", "rocm" or "tpu", or "other" for the defaults everywhere; by default
        that of JAX's default device.
      **options: keywords of the function.

    Raises:
      ConfigError: there is no such platform.

    >>> x, w = jax.ShapeDtypeStruct((8, 16), "float32"), jax.ShapeDtypeStruct((16, 4), "float32")
    >>> found = cost(lambda x, w: x @ w, x, w)
    >>> found.total.flops, found.total.bytes, found.peak
    (1024.0, 896.0, 896)
    """
    closed = trace(function, args, options).closed
    tally = _Tally(depth, chosen_platform(platform))
    peak = tally.add(closed, 1, (), ())
    arguments = sum(map(_nbytes, closed.in_avals)) + sum(
        _nbytes(jnp.asarray(c)) for c in closed.consts
    )
    blocks = sorted(tally.blocks.values(), key=lambda b: (-b.flops, -b.bytes))
    numbers = [sum(values) for values in zip(*(block[1:] for block in blocks), strict=True)]
    return Cost(
        tuple(blocks), Block("total", *numbers), arguments, arguments + peak, tally.unbounded
    )


def _nbytes(aval: Any) -> int:
    dtype = getattr(aval, "dtype", None)
    if dtype is None:
        return 0
    size = 8 if jnp.issubdtype(dtype, jax.dtypes.extended) else jnp.dtype(dtype).itemsize
    return math.prod(aval.shape) * size


def _used(jaxpr: Any) -> list[Any]:
    """Return the equations that a result or an effect depends on; a compiler drops the others."""
    needed = {a for a in jaxpr.outvars if not isinstance(a, jex_core.Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            kept.append(eqn)
            needed |= {a for a in eqn.invars if not isinstance(a, jex_core.Literal)}
    return kept[::-1]


class _Tally:
    """Sums by block, while a jaxpr is walked."""

    def __init__(self, depth: int, platform: str) -> None:
        self.depth = depth
        self.platform = platform
        self.blocks: dict[str, Block] = {}
        self.unbounded = False

    def add(self, closed: Any, times: float, outer: Any, calls: Any) -> int:
        """Add a jaxpr's equations; return the most bytes alive beside its arguments."""
        jaxpr, eqns = closed.jaxpr, _used(closed.jaxpr)
        last = last_reads(jaxpr, eqns)
        alive = peak = 0
        own: dict[Any, int] = {}
        for i, eqn in enumerate(eqns):
            stack, path = joined(outer, scopes(eqn)), within(calls, functions(eqn))
            inner = bodies(eqn)
            made = sum(_nbytes(v.aval) for v in eqn.outvars)
            inside = self._inside(eqn, inner, times, stack, path) if inner else 0
            if not inner:
                self._count(eqn, times, stack, path)
            peak = max(peak, alive + max(made, inside))
            own.update({v: _nbytes(v.aval) for v in eqn.outvars if v in last})
            alive += sum(own[v] for v in eqn.outvars if v in last)
            for atom in {a for a in eqn.invars if not isinstance(a, jex_core.Literal)}:
                if last[atom] == i:
                    alive -= own.pop(atom, 0)
        return peak

    def _inside(self, eqn: Any, inner: list[Any], times: float, stack: Any, path: Any) -> int:
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            stacked = eqn.outvars[params["num_carry"] :]
            kept = sum(_nbytes(v.aval) for v in stacked)
            return kept + self.add(inner[0], times * params["length"], stack, path)
        if name == "cond":
            sides = []
            for body in possible(eqn, inner, self.platform):
                side = _Tally(self.depth, self.platform)
                sides.append((side, side.add(body, times, stack, path)))
            dearest, _ = max(
                sides, key=lambda s: sum(b.flops + b.bytes for b in s[0].blocks.values())
            )
            for block in dearest.blocks.values():
                self._put(block)
            self.unbounded |= any(side.unbounded for side, _ in sides)
            return max(peak for _, peak in sides)
        if name == "while":
            self.unbounded = True
        if name == "shard_map":
            times *= math.prod(params["mesh"].shape[a] for a in params["newly_manual_axes"])
        return max(self.add(body, times, stack, path) for body in inner)

    def _count(self, eqn: Any, times: float, stack: Any, path: Any) -> None:
        if not stack or stack == ("backward",):
            stack = (*stack, *(part for part, _ in path))
        name = "/".join(stack[: self.depth]) or "(no name)"
        flops, products, transcendentals = _operations(eqn)
        moved = 0
        if (stated := _stated(eqn)) is not None:
            moved = stated.bytes_accessed
        elif eqn.primitive.name not in _FREE:
            moved = sum(_nbytes(v.aval) for v in (*eqn.invars, *eqn.outvars))
        self._put(Block(name, *(times * n for n in (flops, products, transcendentals, moved))))

    def _put(self, block: Block) -> None:
        old = self.blocks.get(block.name, Block(block.name))
        sums = (a + b for a, b in zip(old[1:], block[1:], strict=True))
        self.blocks[block.name] = Block(block.name, *sums)


def _operations(eqn: Any) -> tuple[float, float, float]:
    """Return an equation's FLOPs, those of products among them, and its transcendentals."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval if eqn.outvars else None
    size = math.prod(getattr(out, "shape", ()))
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        products = 2.0 * size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        return products, products, 0.0
    if name == "conv_general_dilated":
        products = _convolution(eqn)
        return products, products, 0.0
    if (stated := _stated(eqn)) is not None:
        products = stated.flops if _multiplies(eqn.params["jaxpr"]) else 0
        return float(stated.flops), float(products), float(stated.transcendentals)
    if name in _TRANSCENDENTAL:
        return 0.0, 0.0, float(size)
    if name in _ELEMENTWISE:
        return float(size), 0.0, 0.0
    if name == "integer_pow":
        return float(size) * max(1, abs(eqn.params["y"]).bit_length() - 1), 0.0, 0.0
    if name.startswith(("reduce_", "arg")) and name != "reduce_precision":
        return float(math.prod(eqn.invars[0].aval.shape) - size), 0.0, 0.0
    if name in ("cumsum", "cumprod", "cummax", "cummin"):
        return float(size), 0.0, 0.0
    return 0.0, 0.0, 0.0


def _stated(eqn: Any) -> Any:
    """Return what a Pallas kernel says that it costs, or ``None``."""
    return eqn.params.get("cost_estimate") if eqn.primitive.name == "pallas_call" else None


def _multiplies(jaxpr: Any) -> bool:
    """Tell whether a kernel's work is matrix products: it does not state them apart."""
    return any(
        eqn.primitive.name == "dot_general"
        or any(map(_multiplies, jex_core.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def _convolution(eqn: Any) -> float:
    """Count a convolution's products with what is there, not with padding or dilation's holes."""
    params, (left, right) = eqn.params, (v.aval.shape for v in eqn.invars)
    numbers, out = params["dimension_numbers"], eqn.outvars[0].aval.shape
    pairs = 1
    for d, (low, _) in enumerate(params["padding"]):
        size = left[numbers.lhs_spec[2 + d]]
        holes, step = params["lhs_dilation"][d], params["window_strides"][d]
        starts = np.arange(out[numbers.out_spec[2 + d]]) * step - low
        taps = np.arange(right[numbers.rhs_spec[2 + d]]) * params["rhs_dilation"][d]
        place = starts[:, None] + taps[None, :]
        pairs *= int(np.sum((place >= 0) & (place <= (size - 1) * holes) & (place % holes == 0)))
    batch, channels = out[numbers.out_spec[0]], out[numbers.out_spec[1]]
    read = right[numbers.rhs_spec[1]]
    return 2.0 * pairs * batch * channels * read
