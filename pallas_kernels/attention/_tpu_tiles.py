"""What the TPU kernels share: the layout of their tiles, one tile of scores, and the call."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fnml.pallas_kernels._compiler import tpu_params
from fnml.pallas_kernels._cost import Cost
from fnml.pallas_kernels.attention._tiles import (
    HIDDEN,
    Extras,
    Plan,
    both,
    cap,
    in_window,
    kept,
)

# Where a grid step (b, h, i, j) stands: batch row, query head, tile of queries, tile of keys.
Place = Callable[..., tuple[Any, Any, Any, Any]]


class Layout(NamedTuple):
    """Sizes in whole tiles, and which tile of keys meets which tile of queries."""

    plan: Plan
    q: int
    k: int
    T: int
    S: int
    H: int
    K: int
    keys: int
    """The number of true keys; those beyond are padding."""

    @property
    def rows(self) -> int:
        return self.T // self.q

    @property
    def columns(self) -> int:
        return self.S // self.k

    def columns_of(self, i: Any) -> tuple[Any, Any]:
        """Return the first and the last tile of keys that the queries of tile ``i`` may see."""
        first: Any = 0
        last: Any = self.columns - 1
        if self.plan.left is not None:
            reach = jnp.maximum(i * self.q - self.plan.left, 0)
            first = jnp.minimum(lax.div(reach, jnp.int32(self.k)), last)
        if self.plan.right is not None:
            reach = i * self.q + self.q - 1 + self.plan.right
            last = jnp.minimum(lax.div(reach, jnp.int32(self.k)), last)
        return first, last

    def rows_of(self, j: Any) -> tuple[Any, Any]:
        """Return the first and the last tile of queries that may see the keys of tile ``j``."""
        first: Any = 0
        last: Any = self.rows - 1
        if self.plan.right is not None:
            reach = jnp.maximum(j * self.k - self.plan.right, 0)
            first = jnp.minimum(lax.div(reach, jnp.int32(self.q)), last)
        if self.plan.left is not None:
            reach = j * self.k + self.k - 1 + self.plan.left
            last = jnp.minimum(lax.div(reach, jnp.int32(self.q)), last)
        return first, last

    def visible(self, i: Any, j: Any) -> Any:
        """Whether any query of tile ``i`` may see any key of tile ``j``."""
        first, last = self.columns_of(i)
        return (first <= j) & (j <= last)


def tile_layout(plan: Plan, q: jax.Array, k: jax.Array, block_q: int, block_k: int) -> Layout:
    """Cut q [B, T, H, D] and k [B, S, K, D] into tiles of at most so many rows, in whole lanes."""
    T, H = q.shape[1:3]
    S, K = k.shape[1:3]
    block_q, block_k = min(block_q, _round_up(T, 128)), min(block_k, _round_up(S, 128))
    T, keys, S = _round_up(T, block_q), S, _round_up(S, block_k)
    return Layout(plan, block_q, block_k, T, S, H, K, keys)


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def pad(x: jax.Array, axis: int, size: int, value: Any = 0) -> jax.Array:
    """Fill an axis up behind its end to ``size`` with ``value``."""
    widths = [(0, 0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis], 0)
    return lax.pad(x, jnp.asarray(value, x.dtype), widths)


def heads_first(x: jax.Array, size: int) -> jax.Array:
    """[B, T, H, D] to [B, H, size, D]."""
    return pad(x.transpose(0, 2, 1, 3), 2, size)


def dot(a: jax.Array, b: jax.Array, over_a: int, over_b: int) -> jax.Array:
    """Multiply two tiles over one axis of each, in float32 to its full precision."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a,
        b,
        (((over_a,), (over_b,)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )


class Operand(NamedTuple):
    """One input of a kernel: its name there, the array and how it is cut into tiles."""

    name: str
    array: jax.Array
    spec: pl.BlockSpec


def operands(layout: Layout, place: Place, arrays: dict[str, Any], extras: Extras) -> list:
    """Describe the inputs of a kernel whose grid steps stand at ``place``."""
    group = layout.H // layout.K
    div = partial(lambda n, h: lax.div(h, jnp.int32(n)), group)

    def spec(shape: tuple[int, ...], index: Callable[..., tuple]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *step: index(*place(*step)))

    D = arrays["q"].shape[-1]
    of_query = spec((1, 1, layout.q, D), lambda b, h, i, j: (b, h, i, 0))
    of_key = spec((1, 1, layout.k, D), lambda b, h, i, j: (b, div(h), j, 0))
    of_row = spec((1, 1, 1, layout.q), lambda b, h, i, j: (b, h, 0, i))
    specs = {"q": of_query, "grad": of_query, "k": of_key, "v": of_key}
    found = [Operand(name, x, specs.get(name, of_row)) for name, x in arrays.items()]
    if extras.seed is not None:
        whole = pl.BlockSpec(memory_space=pltpu.SMEM)
        found.append(Operand("seed", extras.seed, whole))
    if extras.q_segments is not None and extras.k_segments is not None:
        own = pad(extras.q_segments, 1, layout.T)[:, None]
        other = pad(extras.k_segments, 1, layout.S, HIDDEN)[:, None]
        by_query = spec((1, 1, layout.q), lambda b, h, i, j: (b, 0, i))
        by_key = spec((1, 1, layout.k), lambda b, h, i, j: (b, 0, j))
        found += [Operand("own", own, by_query), Operand("other", other, by_key)]
    for name, x in (("bias", extras.bias), ("mask", extras.mask)):
        if x is not None:
            if name == "mask":
                x = x.astype(jnp.int8)
            B, H = x.shape[:2]
            x = pad(pad(x, 2, layout.T), 3, layout.S)
            tile = spec(
                (1, 1, layout.q, layout.k),
                lambda b, h, i, j, B=B, H=H: (0 if B == 1 else b, 0 if H == 1 else h, i, j),
            )
            found.append(Operand(name, x, tile))
    return found


def column(row: jax.Array) -> jax.Array:
    """[1, n] to [n, 1]."""
    return jnp.transpose(row)


def tile_scores(layout: Layout, refs: dict[str, Any], b: Any, h: Any, i: Any, j: Any) -> tuple:
    """Return one tile's scores [q, k], -inf where hidden, the capped ones and what is kept."""
    plan = layout.plan
    capped = cap(plan, dot(refs["q"][0, 0], refs["k"][0, 0], 1, 1) * plan.scale)
    tile = (layout.q, layout.k)
    query = i * layout.q + lax.broadcasted_iota(jnp.int32, tile, 0)
    key = j * layout.k + lax.broadcasted_iota(jnp.int32, tile, 1)
    seen, scores = in_window(plan, query, key), capped
    if layout.keys != layout.S:
        seen = both(seen, key < layout.keys)
    if "bias" in refs:
        scores = scores + refs["bias"][0, 0].astype(jnp.float32)
    if "own" in refs:
        seen = both(seen, column(refs["own"][0]) == refs["other"][0])
    if "mask" in refs:
        seen = both(seen, refs["mask"][0, 0].astype(jnp.int32) != 0)
    if seen is not None:
        scores = jnp.where(seen, scores, -jnp.inf)
    keep = None
    if "seed" in refs:
        seed = refs["seed"]
        keep = kept(plan, (seed[0], seed[1]), b * layout.H + h, query, key)
    return scores, capped, keep


def call(
    kernel: Callable[..., None],
    operands: list[Operand],
    grid: tuple[int, ...],
    outs: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    scratch: Mapping[str, tuple[int, ...]],
    semantics: Sequence[Any],
    counted: Cost,
    interpret: Any,
) -> dict[str, jax.Array]:
    """Call a kernel that takes all its references by name."""
    names = [*(operand.name for operand in operands), *outs, *scratch]

    def body(*refs: Any) -> None:
        kernel(dict(zip(names, refs, strict=True)))

    results = pl.pallas_call(
        body,
        grid=grid,
        in_specs=[operand.spec for operand in operands],
        out_shape=[shape for shape, _ in outs.values()],
        out_specs=[spec for _, spec in outs.values()],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        compiler_params=tpu_params(*semantics),
        cost_estimate=pl.CostEstimate(*counted),
        interpret=interpret,
    )(*(operand.array for operand in operands))
    return dict(zip(outs, results, strict=True))
