"""Every ordered pair of transforms of one kind, run both ways; the table in the docs is this one.

To write the table anew after a change: ``FNML_WRITE_DOCS=1 pytest tests/laws/test_compositions.py``.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fnml.core import FnmlError, Metrics, Model, ShapeError, State, init
from fnml.models import MLPConfig, mlp
from fnml.pallas_kernels import native_faults
from fnml.train import cross_entropy, train_step
from fnml.transforms import (
    Policy,
    accumulate,
    adapt,
    autocast,
    cast,
    checked,
    data_parallel,
    ema,
    ema_params,
    ensemble,
    freeze,
    fuse,
    lora,
    loss_scaling,
    mixed_precision,
    native,
    noise_scale,
    per_example,
    pmap,
    population,
    private,
    prune,
    quantize,
    quantize_aware,
    remat,
    sam,
    scaled_value_and_grad,
    shard,
    skip_nonfinite,
    state_shardings,
    with_loss_scale,
)

DOCS = Path(__file__).parents[2] / "docs" / "compositions.md"
MODEL = mlp(MLPConfig(inputs=6, hidden=(8,), outputs=3))
RNG = np.random.default_rng(0)
BATCH = {
    "x": jnp.asarray(RNG.normal(size=(8, 6)), jnp.float32),
    "y": jnp.asarray(RNG.integers(0, 3, 8), jnp.int32),
    "w": jnp.asarray(RNG.uniform(0.5, 2.0, 8), jnp.float32),
}
KEY = jax.random.key(1)
PARAMS = init(MODEL.spec, jax.random.key(0))
SGD = optax.sgd(0.1)


def loss_fn(params, batch, key):
    logits = MODEL.apply(params, batch["x"])
    loss = cross_entropy(logits, batch["y"], weights=batch["w"])
    return loss.value, Metrics(loss.weight)


def mesh():
    return jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def stack(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.stack([x, x]), tree)


class Training(NamedTuple):
    """What a step transform may touch: the step as made of a gradient function, and its inputs."""

    make_step: Callable[[Any], Any]
    state: State
    batch: Any = BATCH


def on_step(
    transform: Callable[[Any], Any],
    state: Callable[[Any], Any] = lambda state: state,
    batch: Callable[[Any], Any] = lambda batch: batch,
) -> Callable[[Training], Training]:
    """Apply a transform of a step, and what it asks of the state and the batch."""
    return lambda t: Training(lambda g: transform(t.make_step(g)), state(t.state), batch(t.batch))


def scale_losses(t: Training) -> Training:
    return Training(lambda g: loss_scaling(t.make_step, g), with_loss_scale(t.state), t.batch)


def divide(t: Training) -> Training:
    """Let the compiler divide each parameter by its last even dimension, and every batch."""
    where = mesh()

    def halves(p: jax.Array) -> NamedSharding:
        even = [axis for axis, size in enumerate(p.shape) if size % 2 == 0]
        return NamedSharding(where, P(*[None] * even[-1], "data") if even else P())

    shardings = state_shardings(t.state, jax.tree.map(halves, t.state.params))
    # The batches of several steps lie stacked.
    batch = P("data") if t.batch["x"].ndim == BATCH["x"].ndim else P(None, "data")
    return t._replace(make_step=lambda g: shard(t.make_step(g), where, shardings, batch))


def train(transform: Callable[[Training], Training], optimizer: Any = SGD) -> State:
    """Apply a step transform and call the step that comes out once."""
    start = State.create(PARAMS, optimizer, KEY)
    t = transform(Training(lambda g: train_step(g, optimizer), start))
    new, _ = jax.jit(t.make_step(scaled_value_and_grad(loss_fn)))(t.state, t.batch)
    return new


def compute(transform: Callable[[Model], Model]) -> jax.Array:
    """Apply a transform of a model, and the model that comes out, on parameters for it."""
    model = transform(MODEL)
    try:
        params = adapt(model, PARAMS, KEY)
    except ShapeError:
        # An ensemble's members are drawn, each by itself.
        params = init(model.spec, KEY)
    return jax.jit(model.apply)(params, BATCH["x"])


Transform = Callable[[Any], Any]


class Kind(NamedTuple):
    """Transforms of one kind of thing.

    Attributes:
      members: the transforms by name.
      run: applies a transform to a thing of this kind, and returns the numbers that come out.
    """

    members: dict[str, Transform]
    run: Callable[[Transform], Any]


BF16 = Policy("float32", "bfloat16", "float32")
GRAD = jax.value_and_grad(loss_fn, has_aux=True)
STEP_TRANSFORMS: dict[str, Transform] = {
    "checked": on_step(checked),
    "fuse": on_step(lambda step: fuse(step, 2), batch=stack),
    "loss_scaling": scale_losses,
    "population": on_step(lambda step: population(step, mode="map"), state=stack),
    "shard": divide,
    "skip_nonfinite": on_step(skip_nonfinite),
}
KINDS: dict[str, Kind] = {
    "models": Kind(
        {
            "cast": lambda m: cast(m, "bfloat16"),
            "ensemble": lambda m: ensemble(m, 2),
            "freeze": freeze,
            "lora": lambda m: lora(m, rank=2),
            "prune": prune,
            "quantize": quantize,
            "quantize_aware": quantize_aware,
        },
        compute,
    ),
    "losses": Kind(
        {
            "autocast": autocast,
            "checked": checked,
            "mixed_precision": lambda f: mixed_precision(f, BF16),
            **({} if native_faults() else {"native": native}),
            "remat": lambda f: remat(f, scope="whole"),
        },
        lambda t: jax.jit(jax.value_and_grad(t(loss_fn), has_aux=True))(PARAMS, BATCH, KEY),
    ),
    "gradient functions": Kind(
        {
            "accumulate": lambda g: accumulate(g, 2),
            "checked": checked,
            "data_parallel": lambda g: data_parallel(g, mesh()),
            "noise_scale": lambda g: noise_scale(g, lambda g: accumulate(g, 2)),
            "per_example": per_example,
            "pmap": lambda g: pmap(g, jax.devices()[:2]),
            "private": lambda g: private(g, clip=0.5, noise=1.0),
            "sam": sam,
        },
        lambda t: jax.jit(t(GRAD))(PARAMS, BATCH, KEY),
    ),
    "steps": Kind(STEP_TRANSFORMS, lambda t: dataclasses.replace(train(t), key=())),
}


@functools.cache
def run(kind: str, outer: str, inner: str) -> list[np.ndarray] | FnmlError:
    """Return the numbers that ``outer(inner(f))`` comes to, or the error that refuses it."""
    members, compute = KINDS[kind]
    try:
        numbers = leaves(compute(lambda f: members[outer](members[inner](f))))
    except FnmlError as error:
        return error
    assert all(np.isfinite(x).all() for x in numbers), (outer, inner)
    return numbers


def verdict(kind: str, outer: str, inner: str) -> str:
    """Say how ``outer(inner(f))`` stands to ``inner(outer(f))``."""
    one, other = run(kind, outer, inner), run(kind, inner, outer)
    if isinstance(one, FnmlError):
        return f"refused: {one}"
    if isinstance(other, FnmlError):
        return "composes; the other order is refused"
    if [x.shape for x in one] != [x.shape for x in other]:
        return "composes; the other order means something else"
    if all(map(np.array_equal, one, other)):
        return "commutes, same bits"
    x, y = (np.concatenate([np.ravel(v).astype(float) for v in side]) for side in (one, other))
    if np.linalg.norm(x - y) <= 1e-6 * np.linalg.norm(y):
        return "commutes to rounding"
    return "composes; the other order means something else"


@functools.cache
def table(kind: str) -> str:
    names = list(KINDS[kind].members)
    lines = ["| outer | inner | |", "|---|---|---|"]
    for outer in names:
        for inner in names:
            lines.append(f"| `{outer}` | `{inner}` | {verdict(kind, outer, inner)} |")
    return "\n".join(lines)


@functools.cache
def ema_table() -> str:
    """Return how ``ema`` goes with each step transform; it is one of the optimizer, hence inside."""
    lines = ["| outer | inner | |", "|---|---|---|"]
    for name, transform in STEP_TRANSFORMS.items():
        plain, averaged = train(transform), train(transform, ema(SGD, 0.5))
        params, means = leaves(averaged.params), leaves(ema_params(averaged))
        same = all(map(np.array_equal, leaves(plain.params), params))
        kept = [m.shape for m in means] == [p.shape for p in params]
        assert all(np.isfinite(m).all() for m in means)
        fine = same and kept
        said = "commutes, same bits; the average goes along" if fine else "changes training"
        lines.append(f"| `{name}` | `ema` | {said} |")
    try:
        ema(ema(SGD, 0.5), 0.5).init(PARAMS)
    except FnmlError as error:
        lines.append(f"| `ema` | `ema` | refused: {error} |")
    return "\n".join(lines)


def document() -> str:
    """Return the page for the docs."""
    parts = [
        "# Which transforms go in which order",
        "",
        "Generated by `tests/laws/test_compositions.py`, which runs every pair below as",
        "`outer(inner(f))` and compares it with `inner(outer(f))`. Across kinds the order follows",
        "from what a transform takes: transforms of a loss come before `jax.value_and_grad`, those",
        "of a gradient function after it and before `train_step`, those of a step last. `ema` wraps",
        "the optimizer. `loss_scaling` wraps what makes a step, and takes the gradients of",
        "`scaled_value_and_grad`, which stands where `jax.value_and_grad` would.",
    ]
    for title, rows in tables().items():
        parts += ["", f"## On {title}", "", rows()]
    return "\n".join(parts) + "\n"


def tables() -> dict[str, Callable[[], str]]:
    return {
        **{kind: functools.partial(table, kind) for kind in KINDS},
        "optimizers, under steps": ema_table,
    }


@pytest.mark.parametrize("title", list(tables()))
def test_the_docs_hold_the_table_that_was_run(title: str) -> None:
    if not DOCS.parent.exists():
        pytest.skip("the installed wheel has no docs")
    if os.environ.get("FNML_WRITE_DOCS"):
        DOCS.write_text(document())
    page = DOCS.read_text()
    if native_faults():
        # Its rows need a compiler; all others are looked at without it too.
        page = "".join(line for line in page.splitlines(True) if "| `native` |" not in line)
    rows = tables()[title]()
    assert f"## On {title}\n\n{rows}\n" in page, "out of date: see this file's head"


@pytest.mark.skipif(bool(native_faults()), reason="; ".join(native_faults()))
def test_native_pairs_run_in_cpp() -> None:
    for transform in (native, lambda f: remat(native(f)), lambda f: native(remat(f))):
        grad_fn = jax.value_and_grad(transform(loss_fn), has_aux=True)
        program = jax.jit(grad_fn).lower(PARAMS, BATCH, KEY).as_text()
        assert "fnml_gelu_forward" in program and "fnml_gelu_backward" in program


def test_layouts_commute_bit_for_bit() -> None:
    text = table("gradient functions")
    for layout in ("data_parallel", "pmap"):
        assert f"| `accumulate` | `{layout}` | commutes, same bits |" in text
        assert f"| `{layout}` | `accumulate` | commutes, same bits |" in text


def test_refusals_name_the_rule_and_the_order_that_works() -> None:
    for rows in tables().values():
        for line in rows().splitlines():
            if "refused:" in line:
                reason = line.split("refused:")[1]
                # An order that works is spelt out; what cannot be done twice names its cure.
                assert any(word in reason for word in ("(", "keep=", "once")), line


def test_what_shard_made_lies_on_two_devices() -> None:
    kernels = [p for p in jax.tree.leaves(train(divide).params) if p.ndim == 2]
    assert kernels and all(len(p.sharding.device_set) == 2 for p in kernels)
    assert all(p.addressable_shards[0].data.size == p.size // 2 for p in kernels)


def test_a_pair_that_is_not_laid_out_alike_does_not_pass_for_one_that_commutes() -> None:
    assert verdict("gradient functions", "noise_scale", "sam").startswith("composes;")
    assert verdict("steps", "loss_scaling", "fuse").startswith("refused: ")
    assert "changes" not in ema_table() and ema_table().count("commutes") == len(STEP_TRANSFORMS)
