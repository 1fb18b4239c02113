"""Every transform's law, on every model: a new transform is one row.

Gradients are compared, never the trajectories of Adam, which hides a wrong scale.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
from law_cases import STEPS, Case, bits, cases, distances

from fnml.core import State
from fnml.train import train_step
from fnml.transforms import accumulate, fuse, remat

CASES = cases()
# Float32 sums of a few thousand terms in another order: some ulps of 1.2e-7, relative in norm.
ROUNDING = 3e-6


class Law(NamedTuple):
    """An equation between two results ``((loss, metrics), grads)``.

    Attributes:
      left: the transformed side.
      right: the side it has to equal.
      holds: for which models the law is stated.
      bound: how far apart the sides may be, relative in norm; 0 for the same bits.
    """

    name: str
    left: Callable[[Case], Any]
    right: Callable[[Case], Any]
    holds: Callable[[Case], bool] = lambda case: True
    bound: float = ROUNDING


@functools.cache
def plain(case: Case) -> Any:
    return case.grads(case.grad_fn)


@functools.cache
def accumulated(case: Case) -> Any:
    return case.grads(accumulate(case.grad_fn, 4))


def rematerialised(policy: str, scope: str) -> Callable[[Case], Any]:
    return lambda case: case.grads(
        jax.value_and_grad(remat(case.loss_fn, policy, scope=scope), has_aux=True)
    )


LAWS = [
    Law("accumulate is the weighted mean of shards", accumulated, lambda case: case.shards(4)),
    Law("accumulate is the whole batch", accumulated, plain, lambda case: case.whole),
    Law(
        "accumulate 2 of accumulate 2 is accumulate 4",
        lambda case: case.grads(accumulate(accumulate(case.grad_fn, 2), 2)),
        accumulated,
        bound=0.0,
    ),
    *(
        Law(f"remat {policy} {scope} changes nothing", rematerialised(policy, scope), plain)
        for policy, scope in (("nothing", "layers"), ("dots", "layers"), ("nothing", "whole"))
    ),
    Law(
        "accumulate of remat is accumulate",
        lambda case: case.grads(
            accumulate(jax.value_and_grad(remat(case.loss_fn), has_aux=True), 4)
        ),
        accumulated,
    ),
]
ROWS = [(law, name) for law in LAWS for name, case in CASES.items() if law.holds(case)]


@pytest.mark.parametrize(("law", "name"), ROWS, ids=[f"{law.name}-{name}" for law, name in ROWS])
def test_gradients_loss_and_metrics(law, name):
    found = distances(law.left(CASES[name]), law.right(CASES[name]))
    assert max(found.values()) <= law.bound, found


STEPPED = {
    "plain": lambda case: case.grad_fn,
    "accumulate of remat": lambda case: accumulate(
        jax.value_and_grad(remat(case.loss_fn), has_aux=True), 2
    ),
}


@functools.cache
def run(case: Case, transform: str, fused: bool) -> tuple[State, Any]:
    """Do a few steps of SGD; return the state and the metrics of every step."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, 0.9))
    step = train_step(STEPPED[transform](case), optimizer, grad_norm=True)
    state = State.create(case.params, optimizer, jax.random.key(2), case.model_state)
    if fused:
        return jax.jit(fuse(step, STEPS))(state, case.batches)
    compiled, rows = jax.jit(step), []
    for i in range(STEPS):
        state, metrics = compiled(state, jax.tree.map(lambda x, i=i: x[i], case.batches))
        rows.append(metrics)
    return state, jax.tree.map(lambda *xs: np.stack(xs), *rows)


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt"])
@pytest.mark.parametrize("transform", STEPPED)
def test_fused_steps_have_the_bits_of_single_steps_metrics_included(transform, name):
    fused, single = (run(CASES[name], transform, fused) for fused in (True, False))
    assert int(fused[0].step) == STEPS and fused[1]["loss"].total.shape == (STEPS,)
    assert bits(fused) == bits(single)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.whole])
def test_the_whole_stack_equals_the_plain_steps(name):
    case = CASES[name]
    stacked, _ = run(case, "accumulate of remat", fused=True)
    single, _ = run(case, "plain", fused=False)
    for left, right, start in zip(
        *map(jax.tree.leaves, (stacked.params, single.params, case.params)), strict=True
    ):
        moved = np.linalg.norm(np.subtract(right, start))
        assert moved > 0
        # What is compared is how far SGD moved the parameters: a sum of clipped gradients.
        assert np.linalg.norm(np.subtract(left, right)) < 1e-4 * moved


def test_batch_statistics_of_parts_merge_to_those_of_the_whole_batch():
    case = CASES["cnn"]
    whole, parts = plain(case)[0][1].stats, accumulated(case)[0][1].stats
    # Later layers see what earlier ones normalised per shard; the first norm sees the same data.
    first, merged = whole["stem"]["norm"], parts["stem"]["norm"]
    for moment in ("mean", "square"):
        np.testing.assert_allclose(merged[moment].value, first[moment].value, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(merged[moment].weight, first[moment].weight)


@pytest.mark.parametrize("name", CASES)
def test_the_models_are_not_trivial(name):
    case = CASES[name]
    (loss, metrics), grads = plain(case)
    assert np.isfinite(loss) and float(metrics.weight) > 0
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))
    if not case.whole:
        found = distances(accumulated(case), plain(case))
        assert found["grads"] > 100 * ROUNDING
