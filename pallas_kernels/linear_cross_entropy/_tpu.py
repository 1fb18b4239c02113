"""The loss on TPUs: logits live tile by tile in vector memory, and are made anew per gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fnml.pallas_kernels._compiler import tpu_params
from fnml.pallas_kernels.linear_cross_entropy._blocks import TPU
from fnml.pallas_kernels.linear_cross_entropy._cost import cost
from fnml.pallas_kernels.linear_cross_entropy._tiles import Plan, loss, slope


class _Problem(NamedTuple):
    """The operands in whole tiles: x [N, D], w [D, V], and rows [1, N]."""

    plan: Plan
    x: jax.Array
    w: jax.Array
    labels: jax.Array
    weights: jax.Array
    tokens: int
    classes: int

    @property
    def rows(self) -> int:
        return self.x.shape[0] // self.tokens

    @property
    def columns(self) -> int:
        return self.w.shape[1] // self.classes


def _problem(
    plan: Plan, x: jax.Array, w: jax.Array, labels: jax.Array, weights: jax.Array
) -> _Problem:
    """Fill up to whole tiles: tokens of weight 0, classes whose logits are left out."""
    (N, D), V = x.shape, w.shape[1]
    tokens, classes = TPU[min(widest for widest in TPU if widest >= D)]
    tokens, classes = min(tokens, -(-N // 128) * 128), min(classes, -(-V // 128) * 128)
    more, wider = -N % tokens, -V % classes
    x, w = jnp.pad(x, ((0, more), (0, 0))), jnp.pad(w, ((0, 0), (0, wider)))
    labels, weights = (jnp.pad(a, (0, more))[None] for a in (labels, weights))
    return _Problem(plan, x, w, labels, weights, tokens, classes)


def _dot(a: jax.Array, b: jax.Array, over_a: int, over_b: int) -> jax.Array:
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    over = (((over_a,), (over_b,)), ((), ()))
    return lax.dot_general(a, b, over, precision=exact, preferred_element_type=jnp.float32)


def _tile(
    problem: _Problem, x: Any, w: Any, labels: Any, j: Any
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Return a tile's logits, which of them exist (or None), and where the label is."""
    logits = _dot(x[...], w[...], 1, 0)
    column = j * problem.classes + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    there = None
    if problem.w.shape[1] != problem.plan.classes:
        there = column < problem.plan.classes
    return logits, there, column == jnp.transpose(labels[...])


def _call(
    problem: _Problem,
    kernel: Callable[..., None],
    rows: list[jax.Array],
    outs: list[tuple[jax.ShapeDtypeStruct, str]],
    scratch: list[tuple[int, int]],
    products: int,
    interpret: Any,
    *,
    classes_first: bool = False,
) -> list[jax.Array]:
    """Call a kernel over (tokens, classes), or over (classes, tokens), the second one innermost."""
    D = problem.x.shape[1]

    def spec(shape: tuple[int, int], index: Callable[[Any, Any], tuple]) -> pl.BlockSpec:
        if classes_first:
            return pl.BlockSpec(shape, lambda j, i: index(i, j))
        return pl.BlockSpec(shape, index)

    specs = {
        "x": spec((problem.tokens, D), lambda i, j: (i, 0)),
        "w": spec((D, problem.classes), lambda i, j: (0, j)),
        "row": spec((1, problem.tokens), lambda i, j: (0, i)),
    }
    grid = (problem.rows, problem.columns)
    N, V = problem.x.shape[0], problem.w.shape[1]
    counted = cost(products, N, D, V, problem.x.dtype.itemsize, problem.tokens)
    return pl.pallas_call(
        kernel,
        grid=grid[::-1] if classes_first else grid,
        in_specs=[specs["x"], specs["w"], *[specs["row"]] * len(rows)],
        out_shape=[shape for shape, _ in outs],
        out_specs=[specs[name] for _, name in outs],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=tpu_params("parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(*counted),
        interpret=interpret,
    )(problem.x, problem.w, *rows)


def _statistics(problem: _Problem, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """Return each token's loss and log(Z), both [1, N], by an online sum over the classes."""
    plan = problem.plan

    def kernel(x, w, labels, losses, logs, top, total, chosen, everything):
        j = pl.program_id(1)

        @pl.when(j == 0)
        def _() -> None:
            top[...] = jnp.full(top.shape, -jnp.inf, jnp.float32)
            for sums in (total, chosen, everything):
                sums[...] = jnp.zeros(sums.shape, jnp.float32)

        logits, there, hit = _tile(problem, x, w, labels, j)
        chosen[...] += jnp.where(hit, logits, 0.0).sum(1, keepdims=True)
        if plan.smoothing:
            # Classes of padding have logits of 0.
            everything[...] += logits.sum(1, keepdims=True)
        if there is not None:
            logits = jnp.where(there, logits, -jnp.inf)
        now = jnp.maximum(top[...], logits.max(1, keepdims=True))
        total[...] *= jnp.exp(top[...] - now)
        total[...] += jnp.exp(logits - now).sum(1, keepdims=True)
        top[...] = now

        @pl.when(j == problem.columns - 1)
        def _() -> None:
            log = top[...] + jnp.log(total[...])
            mean = everything[...] * (1 / plan.classes)
            losses[...] = jnp.transpose(loss(plan, log, chosen[...], mean))
            logs[...] = jnp.transpose(log)

    row = jax.ShapeDtypeStruct(problem.labels.shape, jnp.float32)
    column = (problem.tokens, 1)
    outs = [(row, "row"), (row, "row")]
    out, log = _call(problem, kernel, [problem.labels], outs, [column] * 4, 1, interpret)
    return out, log


def losses(
    plan: Plan,
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    *,
    interpret: Any,
) -> jax.Array:
    """Return the losses [N]."""
    problem = _problem(plan, x, w, labels, weights)
    return _statistics(problem, interpret)[0][0, : x.shape[0]]


def losses_and_grads(
    plan: Plan,
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    *,
    interpret: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the losses [N], and the gradients of their weighted sum by x and w."""
    problem = _problem(plan, x, w, labels, weights)
    each, log = _statistics(problem, interpret)
    rows = [problem.labels, problem.weights, log]

    def slopes(x: Any, w: Any, labels: Any, weights: Any, log: Any, j: Any) -> jax.Array:
        logits, there, hit = _tile(problem, x, w, labels, j)
        log, weight = jnp.transpose(log[...]), jnp.transpose(weights[...])
        out = slope(plan, jnp.exp(logits - log), log, hit, weight)
        out = out if there is None else jnp.where(there, out, 0.0)
        return out.astype(x.dtype)

    def back_x(x, w, labels, weights, log, out, acc):
        j = pl.program_id(1)

        @pl.when(j == 0)
        def _() -> None:
            acc[...] = jnp.zeros(acc.shape, jnp.float32)

        acc[...] += _dot(slopes(x, w, labels, weights, log, j), w[...], 1, 1)

        @pl.when(j == problem.columns - 1)
        def _() -> None:
            out[...] = acc[...].astype(out.dtype)

    def back_w(x, w, labels, weights, log, out, acc):
        j, i = pl.program_id(0), pl.program_id(1)

        @pl.when(i == 0)
        def _() -> None:
            acc[...] = jnp.zeros(acc.shape, jnp.float32)

        acc[...] += _dot(x[...], slopes(x, w, labels, weights, log, j), 0, 0)

        @pl.when(i == problem.rows - 1)
        def _() -> None:
            out[...] = acc[...].astype(out.dtype)

    (N, D), V = x.shape, w.shape[1]
    shape_x = jax.ShapeDtypeStruct(problem.x.shape, x.dtype)
    shape_w = jax.ShapeDtypeStruct(problem.w.shape, w.dtype)
    scratch_x, scratch_w = (problem.tokens, D), (D, problem.classes)
    [grad_x] = _call(problem, back_x, rows, [(shape_x, "x")], [scratch_x], 2, interpret)
    [grad_w] = _call(
        problem, back_w, rows, [(shape_w, "w")], [scratch_w], 2, interpret, classes_first=True
    )
    return each[0, :N], grad_x[:N], grad_w[:, :V]
