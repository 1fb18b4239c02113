"""Every transform's law, on every model: a new transform is one row.

Gradients are compared, never the trajectories of Adam, which hides a wrong scale.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from law_cases import KEY, ROUNDING, STEPS, B, Case, bits, cases, distances, wide_text

from fnml.core import Mean, Metrics, State, make_mesh
from fnml.pallas_kernels import native_faults
from fnml.train import train_step
from fnml.transforms import (
    Policy,
    accumulate,
    ema,
    ema_params,
    fuse,
    loss_scaling,
    mixed_precision,
    native,
    noise_scale,
    per_example,
    population,
    private,
    remat,
    sam,
    scaled_value_and_grad,
    shard,
    skip_nonfinite,
    state_shardings,
    with_loss_scale,
)

CASES = cases() | {"gpt_of_width_64": wide_text()}
# The parts of each model that have a body in C++ and sizes that it takes.
IN_CPP = {
    "mlp": {"gelu"},
    "cnn": {"conv2d", "batch_norm_relu"},
    "gpt": {"norm", "rotate", "swiglu"},
    "encoder": {"norm", "gelu"},
    "gpt_of_width_64": {"norm", "rotate", "swiglu", "linear", "attention"},
}
RHO, SCALE, DECAY = 0.05, 2.0**10, 0.9
BF16 = Policy("float32", "bfloat16", "float32")


def value_and_grad(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    return jax.value_and_grad(loss_fn, has_aux=True)


def varied(case: Case) -> bool:
    """Leave out the models that differ from another one in a point or two."""
    alike = "cnn", "resnet", "encoder", "gpt_without_dropout", "gpt_of_width_64"
    return case not in (CASES[name] for name in alike)


def every(case: Case) -> bool:
    """Add the models that share their parts with others, for laws about how a model is built."""
    return varied(case) or case in (CASES["encoder"], CASES["resnet"])


def whole(case: Case) -> bool:
    return case.whole


def in_cpp(case: Case) -> bool:
    return case in (CASES[name] for name in IN_CPP)


class Law(NamedTuple):
    """An equation between two results ``((loss, metrics), grads)``.

    Attributes:
      left: the transformed side.
      right: the side it has to equal.
      holds: for which models the law is stated.
      exact: whether the sides have the same bits; else they are as far apart, relative in norm,
        as two programs for the model's loss may be.
      faults: what keeps this machine from running the left side.
    """

    name: str
    left: Callable[[Case], Any]
    right: Callable[[Case], Any]
    holds: Callable[[Case], bool] = varied
    exact: bool = False
    faults: tuple[str, ...] = ()


@functools.cache
def plain(case: Case) -> Any:
    return case.at(case.params, case.batch)


@functools.cache
def accumulated(case: Case) -> Any:
    return case.grads(accumulate(case.grad_fn, 4))


def rematerialised(policy: str, scope: str) -> Callable[[Case], Any]:
    return lambda case: case.grads(value_and_grad(remat(case.loss_fn, policy, scope=scope)))


def natively(case: Case) -> Any:
    """Return the gradients from a program that runs in C++ what it can, and no less."""
    grad_fn = jax.jit(value_and_grad(native(case.loss_fn)))
    lowered = grad_fn.lower(case.params, case.batch, KEY, **case.options)
    kinds = "_forward|_backward|_input_gradient|_kernel_gradient"
    called = set(re.findall(rf"fnml_(\w+?)(?:{kinds})?-", lowered.as_text()))
    assert called == next(parts for name, parts in IN_CPP.items() if case is CASES[name])
    return lowered.compile()(case.params, case.batch, KEY, **case.options)


def cast_by_hand(case: Case) -> Any:
    """Return the gradients of the loss of arguments cast to bfloat16."""

    def narrow(tree: Any) -> Any:
        floats = jnp.floating
        return jax.tree.map(
            lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, floats) else x, tree
        )

    def loss_fn(params: Any, batch: Any, key: Any, **options: Any) -> Any:
        loss, metrics = case.loss_fn(narrow(params), narrow(batch), key, **options)
        return loss.astype(jnp.float32), metrics

    return case.grads(value_and_grad(loss_fn))


def without(result: Any, *names: str) -> Any:
    """Leave out the metrics that a transform adds."""
    (loss, metrics), grads = result
    values = {name: mean for name, mean in metrics.values.items() if name not in names}
    assert len(values) + len(names) == len(metrics.values)
    return (loss, dataclasses.replace(metrics, values=values)), grads


def norm(grads: Any) -> float:
    """Return the global norm in float64."""
    return float(np.sqrt(sum(np.sum(np.square(np.float64(g))) for g in jax.tree.leaves(grads))))


def climbed_by_hand(case: Case) -> Any:
    """Return loss and metrics at the parameters, gradients at those moved uphill by RHO."""
    (loss, metrics), grads = plain(case)
    share = RHO / norm(grads)
    uphill = jax.tree.map(lambda p, g: np.float32(p + share * np.float64(g)), case.params, grads)
    (high, _), sharp = case.at(uphill, case.batch)
    rise = np.float64(high) - np.float64(loss)
    values = {**metrics.values, "sharpness": Mean(rise * metrics.weight, metrics.weight)}
    return (loss, dataclasses.replace(metrics, values=values)), sharp


@functools.cache
def mean_of_examples(case: Case) -> Any:
    """Return the weighted mean over the leading axis of ``per_example``."""
    (losses, metrics), grads = jax.device_get(case.grads(per_example(case.grad_fn)))
    weights = np.float64(metrics.weight)

    def mean(x: np.ndarray) -> np.ndarray:
        return np.tensordot(weights, np.float64(x), 1) / weights.sum()

    total = jax.tree.map(lambda x: np.sum(np.float64(x), 0), metrics)
    return (mean(losses), total), jax.tree.map(mean, grads)


@functools.cache
def median_norm(case: Case) -> float:
    return float(np.median([norm(grads) for _, grads in case.parts(B)]))


def clipped_by_hand(case: Case) -> Any:
    """Return the plain mean of the examples' clipped gradients, each example computed alone."""
    parts, clip = case.parts(B), median_norm(case)
    shares = [min(1.0, clip / max(norm(grads), 1e-30)) for _, grads in parts]
    assert min(shares) < 1 and shares.count(1.0) > 1, "some are clipped, others are not"

    def total(*xs: Any) -> np.ndarray:
        return np.sum(np.float64(xs), 0)

    loss = np.mean([np.float64(loss) for (loss, _), _ in parts])
    metrics = jax.tree.map(total, *[metrics for (_, metrics), _ in parts])
    grads = jax.tree.map(
        lambda *gs: np.mean([s * np.float64(g) for s, g in zip(shares, gs, strict=True)], 0),
        *[grads for _, grads in parts],
    )
    return (loss, Metrics(np.float64(B), metrics.values, metrics.stats)), grads


LAWS = [
    Law(
        "accumulate is the weighted mean of shards",
        accumulated,
        lambda case: case.shards(4),
        every,
    ),
    Law("accumulate is the whole batch", accumulated, plain, whole),
    Law(
        "accumulate 2 of accumulate 2 is accumulate 4",
        lambda case: case.grads(accumulate(accumulate(case.grad_fn, 2), 2)),
        accumulated,
        exact=True,
    ),
    *(
        Law(f"remat {policy} {scope} changes nothing", rematerialised(policy, scope), plain, holds)
        for policy, scope, holds in (
            ("nothing", "layers", every),
            ("dots", "layers", varied),
            ("nothing", "whole", varied),
        )
    ),
    # C++ rounds as float32 does, on matrix tiles too, where what a product leaves out is below
    # 2**-24 of it, but adds in another order: so the bound is that for two programs of XLA.
    # Measured with vectors only: up to 7.3e-7.
    Law("native changes nothing", natively, plain, in_cpp, faults=tuple(native_faults())),
    Law(
        "accumulate of remat is accumulate",
        lambda case: case.grads(accumulate(value_and_grad(remat(case.loss_fn)), 4)),
        accumulated,
    ),
    Law(
        "mixed_precision in float32 changes nothing",
        lambda case: case.grads(
            value_and_grad(mixed_precision(case.loss_fn, Policy(compute="float32")))
        ),
        plain,
        exact=True,
    ),
    Law(
        "mixed_precision is the cast by hand",
        lambda case: case.grads(value_and_grad(mixed_precision(case.loss_fn, BF16))),
        cast_by_hand,
        exact=True,
    ),
    Law(
        "a scaled loss has the same gradients",
        lambda case: without(
            case.grads(scaled_value_and_grad(case.loss_fn), loss_scale=jnp.float32(SCALE)),
            "loss_scale",
        ),
        plain,
        exact=True,
    ),
    Law(
        "sam is the gradient uphill",
        lambda case: case.grads(sam(case.grad_fn, RHO)),
        climbed_by_hand,
    ),
    Law(
        "noise_scale changes nothing else",
        lambda case: without(
            case.grads(noise_scale(case.grad_fn, lambda g: accumulate(g, 4))),
            "noise_scale_signal",
            "noise_scale_trace",
        ),
        accumulated,
        exact=True,
    ),
    Law(
        "the mean of per_example is that of examples alone",
        mean_of_examples,
        lambda case: case.shards(B),
    ),
    Law("the mean of per_example is the whole batch", mean_of_examples, plain, whole),
    Law(
        "private without noise is the mean of clipped examples",
        lambda case: case.grads(private(case.grad_fn, clip=median_norm(case), noise=0.0)),
        clipped_by_hand,
    ),
]
ROWS = [(law, name) for law in LAWS for name, case in CASES.items() if law.holds(case)]


@pytest.mark.parametrize(("law", "name"), ROWS, ids=[f"{law.name}-{name}" for law, name in ROWS])
def test_gradients_loss_and_metrics(law, name):
    if law.faults:
        pytest.skip("; ".join(law.faults))
    left, right = law.left(CASES[name]), law.right(CASES[name])
    found = distances(left, right)
    assert max(found.values()) <= (0.0 if law.exact else CASES[name].rounding), found
    if law.exact:
        assert bits(left) == bits(right)


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, 0.9))
STEPPED = {
    "plain": lambda case: case.grad_fn,
    "accumulate of remat": lambda case: accumulate(value_and_grad(remat(case.loss_fn)), 2),
}


def step_of(grad_fn: Any, optimizer: Any = OPTIMIZER) -> Callable[..., Any]:
    return train_step(grad_fn, optimizer, grad_norm=True)


def start(case: Case, optimizer: Any = OPTIMIZER) -> State:
    return State.create(case.params, optimizer, jax.random.key(2), case.model_state)


def walk(case: Case, compiled: Any, state: State) -> tuple[State, Any]:
    """Do a few steps; return the state and the metrics of every step."""
    rows = []
    for i in range(STEPS):
        state, metrics = compiled(state, jax.tree.map(lambda x, i=i: x[i], case.batches))
        rows.append(metrics)
    return state, jax.tree.map(lambda *xs: np.stack(xs), *rows)


@functools.cache
def compiled(case: Case, transform: str) -> Any:
    return jax.jit(step_of(STEPPED[transform](case)))


@functools.cache
def stepped(case: Case, transform: str = "plain") -> tuple[State, Any]:
    return walk(case, compiled(case, transform), start(case))


@functools.cache
def fused(case: Case, transform: str) -> tuple[State, Any]:
    step = step_of(STEPPED[transform](case))
    return jax.jit(fuse(step, STEPS))(start(case), case.batches)


def skipping(case: Case) -> tuple[State, Any]:
    state, metrics = walk(case, jax.jit(skip_nonfinite(step_of(case.grad_fn))), start(case))
    assert not metrics.pop("skipped").total.any()
    return state, metrics


def loss_scaled(case: Case) -> tuple[State, Any]:
    step = loss_scaling(step_of, scaled_value_and_grad(case.loss_fn))
    state, metrics = walk(case, jax.jit(step), with_loss_scale(start(case), SCALE))
    assert not metrics.pop("overflow").total.any()
    assert (metrics.pop("loss_scale").value == SCALE).all()
    return dataclasses.replace(state, opt_state=state.opt_state.inner), metrics


def members(case: Case) -> list[State]:
    """Return states that differ in their parameters and keys."""
    state = start(case)
    return [
        dataclasses.replace(
            state,
            params=jax.tree.map(lambda p, i=i: p * np.float32(1 - 0.2 * i), state.params),
            key=jax.random.fold_in(state.key, i),
        )
        for i in range(2)
    ]


def crowd(case: Case) -> tuple[State, Any]:
    states = jax.tree.map(lambda *xs: jnp.stack(xs), *members(case))
    step = population(step_of(case.grad_fn), mode="map")
    states, metrics = walk(case, jax.jit(step), states)
    return states, jax.tree.map(lambda x: np.swapaxes(x, 0, 1), metrics)


def each_alone(case: Case) -> tuple[State, Any]:
    runs = [walk(case, compiled(case, "plain"), state) for state in members(case)]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *runs)


@functools.cache
def averaging(case: Case) -> tuple[State, Any]:
    optimizer = ema(OPTIMIZER, DECAY)
    return walk(case, jax.jit(step_of(case.grad_fn, optimizer)), start(case, optimizer))


def unaveraged(case: Case) -> tuple[State, Any]:
    state, metrics = averaging(case)
    return dataclasses.replace(state, opt_state=state.opt_state.inner), metrics


def average_by_hand(case: Case) -> Any:
    """Return the weighted mean of the parameters after each step, in float64."""
    state, total = start(case), 0.0
    for i in range(STEPS):
        state, _ = compiled(case, "plain")(state, jax.tree.map(lambda x, i=i: x[i], case.batches))
        share = (1 - DECAY) * DECAY ** (STEPS - 1 - i) / (1 - DECAY**STEPS)
        total = total + share * vector(state.params)
    return (total,)


def vector(tree: Any) -> np.ndarray:
    numbers = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return np.concatenate([np.ravel(np.float64(x)) for x in numbers])


def sharded(case: Case) -> tuple[State, Any]:
    """Let the compiler divide everything in two: each parameter along its first even dimension."""
    mesh = make_mesh({"data": 2}, jax.devices()[:2])

    def halves(p: jax.Array) -> NamedSharding:
        even = next((i for i, size in enumerate(p.shape) if size % 2 == 0), p.ndim)
        return NamedSharding(mesh, P(*[None] * even, *["data"] * (even < p.ndim)))

    places = state_shardings(start(case), jax.tree.map(halves, case.params))
    state = jax.device_put(start(case), places)
    return walk(case, shard(step_of(case.grad_fn), mesh, places), state)


class StepLaw(NamedTuple):
    """An equation between two results of a few steps.

    Attributes:
      left: the transformed side.
      right: the side it has to equal.
      on: the models; those whose compiled steps the other rows need too.
      exact: whether the sides have the same bits; else a state and the metrics, each relative
        in norm; a state holds the momentum, which is a sum of gradients.
    """

    name: str
    left: Callable[[Case], Any]
    right: Callable[[Case], Any]
    on: tuple[str, ...] = ("mlp", "cnn", "gpt")
    exact: bool = True


STEP_LAWS = [
    *(
        StepLaw(
            f"fuse has the bits of single steps, {name}",
            functools.partial(fused, transform=name),
            functools.partial(stepped, transform=name),
            ("mlp", "cnn", "gpt", *more),
        )
        for name, more in (("plain", ("resnet", "encoder")), ("accumulate of remat", ()))
    ),
    StepLaw("skip_nonfinite changes nothing finite", skipping, stepped),
    StepLaw("a member of a population trains as alone", crowd, each_alone),
    StepLaw("shard changes where, not what", sharded, stepped, ("mlp", "gpt"), exact=False),
    # What its branch shares a program with can round otherwise.
    StepLaw("loss_scaling leaves no trace", loss_scaled, stepped, ("mlp", "cnn"), exact=False),
    # An optimizer sees parameters and gradients, so one model tells as much as three.
    StepLaw("ema leaves training alone", unaveraged, stepped, ("mlp",)),
    StepLaw(
        "ema is the weighted mean of the parameters",
        lambda case: (ema_params(averaging(case)[0]),),
        average_by_hand,
        ("mlp",),
        exact=False,
    ),
]
STEP_ROWS = [(law, name) for law in STEP_LAWS for name in law.on]


@pytest.mark.parametrize(
    ("law", "name"), STEP_ROWS, ids=[f"{law.name}-{name}" for law, name in STEP_ROWS]
)
def test_states_and_metrics_of_every_step(law, name):
    left, right = law.left(CASES[name]), law.right(CASES[name])
    if law.exact:
        assert jax.tree.structure(left) == jax.tree.structure(right)
        assert bits(left) == bits(right)
    else:
        for a, b in zip(map(vector, left), map(vector, right), strict=True):
            assert np.linalg.norm(a - b) <= ROUNDING * np.linalg.norm(b)


@pytest.mark.parametrize("name", ["mlp", "gpt_without_dropout"])
def test_the_whole_stack_equals_the_plain_steps(name):
    case = CASES[name]
    stacked, _ = fused(case, "accumulate of remat")
    single, _ = stepped(case)
    for left, right, first in zip(
        *map(jax.tree.leaves, (stacked.params, single.params, case.params)), strict=True
    ):
        moved = np.linalg.norm(np.subtract(right, first))
        assert moved > 0
        # What is compared is how far SGD moved the parameters: a sum of clipped gradients.
        assert np.linalg.norm(np.subtract(left, right)) < 1e-4 * moved


def test_private_without_a_clip_is_the_gradient_where_examples_weigh_alike():
    case = CASES["mlp"]
    even = {**case.batch, "weights": np.ones(B, np.float32)}
    limitless = jax.jit(private(case.grad_fn, clip=1e6, noise=0.0))(case.params, even, KEY)
    found = distances(limitless, case.at(case.params, even))
    assert max(found.values()) <= ROUNDING, found


@pytest.mark.parametrize("name", ["cnn_in_bfloat16", "linen"])
def test_batch_statistics_of_parts_merge_to_those_of_the_whole_batch(name):
    full, parts = (side(CASES[name])[0][1].stats for side in (plain, accumulated))
    if name == "linen":
        # A flax module hands out moving averages, which are averaged over shards.
        moments, kept = ("mean",), ("batch_stats", "BatchNorm_0")
    else:
        moments, kept = ("mean", "square"), ("stem", "norm")
    # Later layers see what earlier ones normalised per shard; the first norm sees the same data.
    for moment in moments:
        first, merged = (functools.reduce(dict.get, (*kept, moment), x) for x in (full, parts))
        np.testing.assert_allclose(merged.value, first.value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("cnn", "gpt_of_width_64")])
def test_the_models_are_not_trivial(name):
    case = CASES[name]
    (loss, metrics), grads = plain(case)
    assert np.isfinite(loss) and float(metrics.weight) > 0
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))
    if not case.whole:
        found = distances(accumulated(case), plain(case))
        assert found["grads"] > 100 * ROUNDING
    # What the rows of other transforms compare would not be noticed if these changed nothing.
    climbed = without(climbed_by_hand(case), "sharpness")
    assert distances(climbed, plain(case))["grads"] > 2 * case.rounding
