"""One batch of 64 logical shards, laid out over devices and micro-batches: one hash per model.

Cell (D, A) is D devices and A micro-batches on each of them in the outermost loop; what is left
of the 64 shards is accumulated inside. Hashes are over the gradients, the loss, its weight, the
metrics and the statistics of BatchNorm.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh
from law_cases import Case, bits, cases

from fnml.core import LayoutError, Mean, Metrics, State, shard_key
from fnml.models import batch_norm, dropout, linear
from fnml.train import accuracy, cross_entropy, train_step
from fnml.transforms import accumulate, data_parallel, fuse, pmap

SHARDS, B, T = 64, 128, 3
KEY = jax.random.key(5)
# Sums of 64 float32 terms in another order: a few ulps of 1.2e-7, relative to the norm.
FAST = 1e-6
# The same against float64, where each shard's own gradient is float32 too.
ROUNDING = 3e-6


def mesh(devices: int, axis: str = "data") -> Mesh:
    chosen = jax.devices()[:devices]
    return jax.make_mesh((devices,), (axis,), devices=chosen, axis_types=(AxisType.Auto,))


def cell(grad_fn: Any, devices: int, micro: int) -> Any:
    """Lay 64 shards out over ``devices``, with an outermost loop of ``micro`` micro-batches."""
    inner = accumulate(grad_fn, SHARDS // (devices * micro))
    return accumulate(data_parallel(inner, mesh(devices)), micro)


def mapped(grad_fn: Any, devices: int) -> Any:
    return pmap(accumulate(grad_fn, SHARDS // devices), jax.devices()[:devices])


def digest(tree: Any) -> str:
    return hashlib.sha256(b"".join(bits(tree))).hexdigest()


def vector(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)])


def relative(left: Any, right: Any) -> float:
    a, b = vector(left), vector(right)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def loss_fn(params, batch, key, *, state, train):
    """Everything that could depend on the layout at once: BatchNorm, dropout, unequal masks."""
    assert train is True
    h = linear(batch["x"], params["in"])
    h, stats = batch_norm(h, params["scale"], params["bias"], state=state, train=train)
    logits = linear(dropout(jnp.tanh(h), 0.3, key), params["out"])
    loss = cross_entropy(logits, batch["y"], weights=batch["mask"])
    right = accuracy(logits, batch["y"], weights=batch["mask"])
    return loss.value, Metrics(loss.weight, {"accuracy": right}, {"mean": stats["mean"]})


grad_fn = jax.value_and_grad(loss_fn, has_aux=True)


@functools.cache
def small() -> tuple[Any, Any, Any]:
    """Return params, batch ``[B, T, 5]`` and model state; a quarter of the shards weigh nothing."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    params = {"in": normal(5, 8), "scale": normal(8), "bias": normal(8), "out": normal(8, 7)}
    lengths = rng.integers(0, T + 1, (B, 1))
    lengths[: B // 4] = 0
    batch = {
        "x": normal(B, T, 5),
        "y": rng.integers(0, 7, (B, T)).astype(np.int32),
        "mask": (np.arange(T) < lengths).astype(np.float32),
    }
    return jax.tree.map(jnp.asarray, (params, batch, {"mean": jnp.zeros(8)}))


def compute(layout: Any, *, jit: bool = True) -> Any:
    params, batch, state = small()
    call = functools.partial(layout, train=True)
    return (jax.jit(call) if jit else call)(params, batch, KEY, state=state)


@functools.cache
def by_device(devices: int) -> Any:
    return compute(cell(grad_fn, devices, 1))


def test_one_hash_in_time_in_space_and_through_pmap():
    found = {(d, 1): digest(by_device(d)) for d in (1, 2, 8)}
    found |= {(d, 2): digest(compute(cell(grad_fn, d, 2))) for d in (1, 2, 8)}
    found |= {("pmap", d): digest(compute(mapped(grad_fn, d))) for d in (1, 2, 8)}
    found["accumulate"] = digest(compute(accumulate(grad_fn, SHARDS)))
    assert len(set(found.values())) == 1, found


def test_the_hash_is_that_of_the_weighted_mean_over_shards():
    params, batch, state = small()
    one = jax.jit(functools.partial(grad_fn, train=True))
    size, weighted, weight, stats = B // SHARDS, 0.0, 0.0, 0.0
    for i in range(SHARDS):
        part = jax.tree.map(lambda x, i=i: x[i * size : (i + 1) * size], batch)
        (loss, metrics), grads = one(params, part, shard_key(KEY, i), state=state)
        mass = float(metrics.weight)
        if mass:  # The loss of a shard in which nothing counts is no number to be averaged.
            weighted, weight = weighted + mass * vector((loss, grads)), weight + mass
        stats += vector(metrics.stats)
    (loss, metrics), grads = by_device(8)
    assert weight == float(metrics.weight) == float(batch["mask"].sum())
    assert relative((loss, grads), weighted / weight) < ROUNDING
    assert relative(metrics.stats, stats) < ROUNDING


@functools.cache
def models() -> dict[str, Case]:
    return cases()


WHOLE = [(d, a) for d in (1, 2, 4, 8) for a in (1, 2, 4, 8)]
# Every number of devices and every number of micro-batches, and the corners.
SPARSE = [(1, 1), (1, 8), (2, 4), (4, 2), (8, 1), (8, 8)]


# The model with most in it has the whole matrix: masks, dropout, attention.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cells", "pmapped"),
    [
        ("cnn", SPARSE, (2, 8)),
        ("gpt", WHOLE, (1, 2, 4, 8)),
        ("gpt_without_dropout", SPARSE, (2, 8)),
    ],
    ids=["CNN-BatchNorm", "GPT-dropout", "masked"],
)
def test_one_hash_per_model_over_the_matrix(name, cells, pmapped):
    case = models()[name]
    # The case's 24 examples, drawn with repetition: no two shards hold the same ones in a row.
    drawn = np.random.default_rng(3).integers(0, 24, B)
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[drawn], case.batches)
    args = case.params, batch, KEY
    found = {
        (d, a): digest(jax.jit(cell(case.grad_fn, d, a))(*args, **case.options)) for d, a in cells
    }
    found |= {("pmap", d): digest(mapped(case.grad_fn, d)(*args, **case.options)) for d in pmapped}
    assert len(set(found.values())) == 1, found


def test_a_weight_that_the_compiler_knows_and_cannot_represent_in_a_shift_has_one_hash_too():
    # Seven examples to a shard: a product with 7 rounds, unless it is fused with an addition.
    draw = np.random.default_rng(11).normal
    params = {name: draw(size=(24, 24)).astype(np.float32) / 5 for name in ("w1", "w2")}
    batch = {name: draw(size=(7 * 8, 24)).astype(np.float32) for name in ("x", "y")}

    def loss_fn(params, batch, key):
        error = (jnp.tanh(batch["x"] @ params["w1"]) @ params["w2"] - batch["y"]) ** 2
        return jnp.mean(error), Metrics(jnp.float32(batch["x"].shape[0]))

    plain = jax.value_and_grad(loss_fn, has_aux=True)
    found = {
        (d, a): digest(
            jax.jit(accumulate(data_parallel(accumulate(plain, 8 // (d * a)), mesh(d)), a))(
                params, batch, KEY
            )
        )
        for d, a in ((1, 1), (1, 8), (2, 2), (4, 1), (4, 2), (8, 1))
    }
    assert len(set(found.values())) == 1, found


@pytest.mark.parametrize("lay", [data_parallel, pmap])
def test_fast_reduction_agrees_to_rounding(lay):
    where = mesh(8) if lay is data_parallel else jax.devices()
    fast = compute(lay(accumulate(grad_fn, SHARDS // 8), where, reduce="fast"))
    (loss, metrics), grads = fast
    (loss_r, metrics_r), grads_r = by_device(8)
    assert relative(grads, grads_r) < FAST and relative(loss, loss_r) < FAST
    assert relative(metrics.stats, metrics_r.stats) < FAST
    # Counts are whole numbers, which add up without rounding in any order.
    assert bits((metrics.weight, metrics.values)) == bits((metrics_r.weight, metrics_r.values))


@functools.cache
def trained(devices: int, micro: int, fused: bool) -> Any:
    """Do three steps of SGD with momentum; return the state and each step's metrics."""
    params, batch, model_state = small()
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, 0.9))
    layout = cell(functools.partial(grad_fn, train=True), devices, micro)
    step = train_step(layout, optimizer, grad_norm=True)
    state = State.create(params, optimizer, jax.random.key(2), model_state)
    batches = jax.tree.map(lambda x: jnp.stack([jnp.roll(x, i, 0) for i in range(3)]), batch)
    if fused:
        return jax.jit(fuse(step, 3))(state, batches)
    compiled, rows = jax.jit(step), []
    for i in range(3):
        state, metrics = compiled(state, jax.tree.map(lambda x, i=i: x[i], batches))
        rows.append(metrics)
    return state, jax.tree.map(lambda *xs: np.stack(xs), *rows)


def test_training_has_one_hash_too_fused_or_not():
    plain, fused = trained(1, 1, False), trained(8, 2, True)
    assert digest(plain) == digest(fused)
    state, metrics = fused
    assert int(state.step) == 3 and metrics["loss"].total.shape == (3,)
    moved = relative(state.params, small()[0])
    assert moved > 1e-3


def test_pmap_outside_of_jit_has_the_same_bits():
    assert digest(compute(mapped(grad_fn, 8), jit=False)) == digest(by_device(8))


def test_another_axis_of_a_larger_mesh_is_left_alone():
    both = jax.make_mesh((2, 4), ("model", "rows"), axis_types=(AxisType.Auto,) * 2)
    layout = data_parallel(accumulate(grad_fn, SHARDS // 4), both, "rows")
    assert digest(compute(layout)) == digest(by_device(8))


def test_random_numbers_belong_to_the_shard_not_to_the_device():
    def draw(params, batch, key):
        values = {"draw": Mean.of(jax.random.normal(key))}
        return (params, Metrics(jnp.float32(1.0), values)), params

    def total(count: int) -> float:
        run = jax.jit(data_parallel(draw, mesh(count)))
        return float(run(jnp.float32(0.0), jnp.zeros(8), KEY)[0][1].values["draw"].total)

    expected = [float(jax.random.normal(shard_key(KEY, i))) for i in range(8)]
    np.testing.assert_allclose(total(8), np.sum(expected), rtol=1e-5)
    np.testing.assert_allclose(total(2), np.sum(expected[:2]), rtol=1e-5)


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "axis": (
        lambda: data_parallel(grad_fn, mesh(2), "dta"),
        r"axes \('data',\), not 'dta'.*Did you mean 'data'",
    ),
    "reduce": (
        lambda: data_parallel(grad_fn, mesh(2), reduce="exakt"),  # type: ignore[arg-type]
        "'exact' or 'fast', got 'exakt'.*Did you mean 'exact'",
    ),
    "reduce of pmap": (
        lambda: pmap(grad_fn, reduce="mean"),  # type: ignore[arg-type]
        "'exact' or 'fast', got 'mean'",
    ),
    "no devices": (lambda: pmap(grad_fn, []), "at least one device, got an empty list"),
    "three inside data_parallel": (
        lambda: data_parallel(accumulate(grad_fn, 3), mesh(2)),
        "data_parallel over a layout of 3 shards.*power of two",
    ),
    "six inside pmap": (
        lambda: pmap(accumulate(grad_fn, 6), jax.devices()[:2]),
        "pmap over a layout of 6 shards.*accumulation by 2 inside",
    ),
    "batch over devices": (
        lambda: compute(data_parallel(grad_fn, mesh(7)), jit=False),
        "128 examples cannot be divided into 7",
    ),
    "batch over pmap": (
        lambda: compute(pmap(grad_fn, jax.devices()[:5]), jit=False),
        "128 examples cannot be divided into 5",
    ),
}


@pytest.mark.parametrize("fault", ERRORS)
def test_what_cannot_be_laid_out_is_named(fault):
    make, message = ERRORS[fault]
    with pytest.raises(LayoutError, match=message):
        make()


def test_three_micro_batches_go_outside_of_the_devices():
    params, batch, state = small()
    batch = jax.tree.map(lambda x: x[-96:], batch)

    def run(layout: Any) -> str:
        call = jax.jit(functools.partial(layout, train=True))
        return digest(call(params, batch, KEY, state=state))

    spread = accumulate(data_parallel(accumulate(grad_fn, 2), mesh(8)), 3)
    assert run(spread) == run(accumulate(grad_fn, 48))
