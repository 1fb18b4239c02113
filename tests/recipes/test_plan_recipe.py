"""Plans of recipes: what changes would do, and searches whose answer is known."""

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import pytest

from fnml.core import ConfigError, LayoutError
from fnml.plan import parse_target
from fnml.recipes import (
    Planner,
    Recipe,
    RunConfig,
    changes,
    cheapest_mesh,
    find_recipe,
    gpt_config,
    gpt_size,
    laid,
    largest_batch,
    shapes,
    try_out,
    with_run,
)
from fnml.recipes._plan import shapes_of

DIGITS = find_recipe("digits")


def answer(total, limit=1000, seconds=1.0, *, refused=""):
    fits = not refused and total <= limit
    memory = SimpleNamespace(total=total)
    return SimpleNamespace(memory=memory, limit=limit, fits=fits, seconds=seconds, refused=refused)


# Memory by batch; the limit is 1000, batches are multiples of 4.
FORMS = {
    "linear": (lambda b: 100 + 7 * b, 128),
    "rather linear": (lambda b: 100 + 7 * b + b % 3 * 9, 124),
    "with a jump": (lambda b: 100 + 5 * b + (300 if b > 60 else 0), 120),
    "constant": (lambda b: 500, None),
    "nothing fits": (lambda b: 2000 + b, 0),
    "less than what is asked for": (lambda b: 100 + 70 * b, 12),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("start", [8, 64])
def test_the_largest_batch_is_found(form, start):
    memory, expected = FORMS[form]
    tried = []

    def plan(batch):
        tried.append(batch)
        return answer(memory(batch))

    size, best, rows = largest_batch(plan, 4, start, most=10)
    assert len(tried) == len(set(tried)) <= 10
    assert [batch for batch, _ in rows] == tried
    assert all(batch % 4 == 0 for batch in tried)
    if expected is None:
        assert size == max(tried) > 8 * start
    else:
        assert size == expected
    assert (best is None) == (size == 0)


def test_a_compiler_that_refuses_is_asked_for_less():
    def plan(batch):
        return answer(2000, refused="no") if batch > 50 else answer(10 * batch)

    size, best, _ = largest_batch(plan, 1, 64, most=12)
    # Without the memory of what was refused there is no line, and halving ends close to the limit.
    assert 48 <= size <= 50
    assert best.memory.total == 10 * size


def test_a_search_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="unit=0"):
        largest_batch(lambda batch: answer(1), 0, 8)


def test_fewer_chips_of_a_kind_keep_a_torus_even_and_a_host_full():
    assert [t.name for t in shapes_of(parse_target("v5p:2x2x4"))] == [
        "v5p:2x2x1",
        "v5p:2x2x2",
        "v5p:2x2x4",
    ]
    assert [t.name for t in shapes_of(parse_target("h100:2x4"))] == [
        "h100:1x1",
        "h100:1x2",
        "h100:1x4",
        "h100:2x4",
    ]


def small(**run):
    """A GPT whose state takes 12 bytes for each of its parameters."""
    config = gpt_config("gpt-1b")
    return with_run(config, batch_size=8, **run)


@dataclass
class Fake:
    """Answers like a planner: memory falls with chips, and tensor parallelism is slow."""

    target: object
    needed: int
    recipe: Recipe = gpt_size

    def __call__(self, config, target):
        axes = dict(part.split("=") for part in config.run.mesh.split(","))
        model, fsdp = int(axes.get("model", 1)), "fsdp" in config.run.rules
        chips = int(axes["data"]) * model if fsdp else model
        seconds = (1.0 + 0.1 * (model - 1) + 0.01 * fsdp) / target.chips
        return answer(self.needed // chips, target.chip.memory, seconds)


def test_the_fewest_chips_and_their_fastest_mesh_are_found():
    # 30 GiB fit into four chips of 15.75 GiB (two of them are no slice), if they are divided.
    best, tried = cheapest_mesh(Fake(parse_target("v5e:2x2"), 30 << 30), small())
    assert best.plan.fits
    assert best.config.run.mesh == "data=4"
    assert best.config.run.rules == "fsdp"
    assert {target.chips for target, _ in tried} == {1, 4}
    # With less, data parallelism is the fastest of those that fit one chip.
    best, tried = cheapest_mesh(Fake(parse_target("v5e:2x2"), 15 << 30), small())
    assert (best.config.run.mesh, best.config.run.rules) == ("data=1", "data")
    assert len(tried) == 1


def test_what_cannot_fit_by_its_state_is_not_compiled():
    config = gpt_config("gpt-70b")
    best, tried = cheapest_mesh(Fake(parse_target("v5e:2x2"), 1), with_run(config, batch_size=8))
    assert (best, tried) == (None, [])


def test_changes_are_those_that_the_options_make():
    config = laid(with_run(DIGITS.config(), mesh="data=4", rules=""), parse_target("cpu:4"))
    found = {variant.name: variant.config.run for variant in changes(config)}
    assert list(found) == ["--remat nothing", "--accumulate 4", "--rules fsdp", "all of these"]
    every = found["all of these"]
    assert (every.remat, every.accumulate, every.rules) == ("nothing", 4, "fsdp")
    assert all(run.mesh == "data=4" for run in found.values())
    # What is there already is no change.
    done = laid(with_run(DIGITS.config(), batch_size=4, remat="nothing"), parse_target("cpu:4"))
    assert [variant.name for variant in changes(done)] == ["--remat off", "--rules fsdp"]


def test_a_mesh_is_spelt_out():
    target = parse_target("v5e:4x4")
    sixteen = with_run(gpt_config("gpt-1b"), batch_size=16)
    assert laid(sixteen, target).run.mesh == "data=16"
    given = with_run(sixteen, mesh="data=-1,model=4", rules="tensor")
    assert laid(given, target).run.mesh == "data=4,model=4"


def test_the_state_of_a_large_model_is_described_and_not_made():
    config = laid(
        with_run(gpt_config("gpt-70b"), batch_size=64, rules="fsdp"), parse_target("v5p:4x4x4")
    )
    state, batch = shapes(gpt_size.build(config, None), config)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert 68e9 < count < 70e9
    one = state.params["layers"]["mlp"]["up"]
    assert one.sharding.shard_shape(one.shape) == (80, 8192 // 64, 28672)
    assert batch["tokens"].sharding.shard_shape(batch["tokens"].shape) == (1, 4096)


def test_a_width_that_chips_do_not_divide_is_named():
    config = with_run(gpt_config("gpt-1b"), batch_size=48, mesh="data=48", rules="fsdp")
    with pytest.raises(LayoutError, match=r"embed.*2048.*48"):
        shapes(gpt_size.build(config, None), config)


def test_a_recipe_is_planned_and_its_variants_are_compiled_once():
    perceptron = dataclasses.replace(DIGITS.config(), network="mlp")
    config = with_run(perceptron, mesh="data=2", rules="fsdp")
    planner = Planner(DIGITS, parse_target("cpu:2"))
    first = planner(config)
    assert planner(config) is first
    assert planner.compiled == 1
    # 64 images of 8 x 8 uint8 with their labels on each, beside the step and the key.
    assert first.memory.batch == 64 * (64 + 4) + 4 + 8
    (accumulated,) = (v for v in changes(laid(config, planner.target)) if "accumulate" in v.name)
    found = try_out(planner, accumulated)
    # The same products; rounding aside, whatever is done in parts is done once.
    assert found.plan.model_flops == first.model_flops
    assert found.plan.memory.activations < first.memory.activations


def test_a_variant_that_cannot_be_says_why():
    planner = Planner(gpt_size, parse_target("cpu:4"))
    config = small(mesh="data=2", rules="")
    (variant,) = [v for v in changes(config) if v.name == "--rules fsdp"]
    found = try_out(planner, variant)
    assert found.plan is None
    assert "2 devices for cpu:4" in found.reason


def test_there_is_no_gpt_of_any_size():
    with pytest.raises(ConfigError, match="'gpt-8b'"):
        gpt_config("gpt-80b")
    assert RunConfig().mesh == ""
