"""``fnml plan [RECIPE] --target ...``."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from fnml.cli._show import show
from fnml.core import parse_mesh
from fnml.parallel import picture
from fnml.plan import CHIPS, Plan, as_bytes, as_seconds, parse_target
from fnml.recipes import (
    BATCH_AXES,
    FLAT,
    SIZES,
    Planner,
    Recipe,
    Variant,
    changes,
    cheapest_mesh,
    find_recipe,
    gpt_config,
    gpt_size,
    laid,
    largest_batch,
    recipe_names,
    shapes,
    try_out,
    with_run,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Say what is planned for, and what is searched."""

    target: str = "cpu"
    """The chips: v5e:4x4, v5p:4x4x4, v6e:16x16, h100:8x8 or h200:8x8 (hosts x GPUs), cpu or cpu:8."""
    show: bool = False
    """Draw where the state lies."""
    changes: bool = True
    """Compile again with remat, accumulation and FSDP, and show what each would change."""
    largest_batch: bool = False
    """Search for the largest batch that fits."""
    cheapest_mesh: bool = False
    """Search for the fewest chips that fit, up to the target's, and the fastest mesh of them."""
    python: str | None = None
    """A Python with the target's compiler; by default FNML_TPU_PYTHON, FNML_CUDA_PYTHON, or this one."""
    cache: bool = True
    """Keep what compilers answer below the user's cache folder, and use what is there."""


def _help() -> str:
    names = [*recipe_names(), *SIZES]
    return "\n".join(
        [
            "usage: fnml plan [RECIPE] [--target v5e:4x4] [options]",
            "",
            "Compile a recipe's training step for chips that are not there, and say what it needs.",
            "The exit code is 1 if it does not fit.",
            "",
            f"Recipes: {', '.join(names)}; the GPTs of those sizes have no data.",
            f"Chips: {', '.join([*CHIPS, 'cpu'])}.",
            "",
            "'fnml plan RECIPE --help' shows a recipe's options.",
        ]
    )


def command(arguments: Sequence[str]) -> int:
    """Plan a recipe; return 1 if it does not fit."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    named = bool(arguments) and not arguments[0].startswith("-")
    name, rest = (arguments[0], arguments[1:]) if named else ("digits", arguments)
    recipe, default = _find(name)
    parser: Any = dataclasses.make_dataclass(
        "Plan",
        [
            ("config", Annotated[recipe.config, FLAT], dataclasses.field(default=default)),
            ("options", Annotated[Options, FLAT], dataclasses.field(default_factory=Options)),
        ],
        namespace={"__doc__": f"Plan the training step of {name}."},
    )
    parsed = tyro.cli(parser, args=rest, prog=f"fnml plan {name}")
    return _plan(recipe, parsed.config, parsed.options)


def _find(name: str) -> tuple[Recipe, Any]:
    if name in SIZES:
        return gpt_size, gpt_config(name)
    recipe = find_recipe(name)
    return recipe, recipe.config()


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "fnml" / "plan"


def _plan(recipe: Recipe, config: Any, options: Options) -> int:
    target = parse_target(options.target)
    planner = Planner(recipe, target, options.python, _cache() if options.cache else None)
    if options.cheapest_mesh:
        return _cheapest(planner, config)
    if options.largest_batch:
        return _largest(planner, config)
    config = laid(config, target)
    if options.show:
        print(picture(shapes(recipe.build(config, None), config)[0]))
    plan = planner(config)
    show(plan.table())
    fitting = _changes(planner, config, plan) if options.changes else None
    if plan.fits:
        return 0
    print(f"it does not fit: {as_bytes(plan.missing)} too much on each chip")
    if fitting:
        print(f"it would fit with {' or '.join(fitting)}")
    elif fitting is not None:
        print(
            "none of these changes makes it fit: --cheapest-mesh looks at all meshes up to --target"
        )
    return 1


def _row(name: str, plan: Plan | None, reason: str = "") -> tuple[str, ...]:
    if plan is None:
        return name, "", reason, "", ""
    if plan.refused:
        return name, f"> {as_bytes(plan.limit)}", "does not fit", "", ""
    verdict = "fits" if plan.fits else f"{as_bytes(plan.missing)} too much"
    return (
        name,
        as_bytes(plan.memory.total),
        verdict,
        as_seconds(plan.seconds),
        f"{plan.utilisation:.1%}",
    )


def _changes(planner: Planner, config: Any, plan: Plan) -> list[str]:
    """Show what changes would do; return those with which it fits."""
    table = Table("change", "memory", "", "step at best", "utilisation at most")
    table.add_row(*_row("as it is", plan))
    fitting = []
    for variant in changes(config):
        found: Variant = try_out(planner, variant)
        table.add_row(*_row(found.name, found.plan, found.reason))
        if found.plan is not None and found.plan.fits:
            fitting.append(found.name)
    show(table)
    return fitting


def _largest(planner: Planner, config: Any) -> int:
    def plan(size: int) -> Plan:
        return planner(with_run(config, batch_size=size))

    run = config.run
    config = laid(
        with_run(config, batch_size=planner.target.chips * run.accumulate), planner.target
    )
    axes = parse_mesh(config.run.mesh)
    unit = math.prod(axes.get(axis, 1) for axis in BATCH_AXES) * run.accumulate
    size, best, tried = largest_batch(plan, unit, run.batch_size)
    table = Table("--batch-size", "memory", "", "step at best", "utilisation at most")
    for batch, found in sorted(tried, key=lambda pair: pair[0]):
        table.add_row(*_row(str(batch), found))
    show(table)
    if best is None:
        print(f"no batch fits, not even {min(batch for batch, _ in tried)}")
        return 1
    print(f"the largest batch found to fit is {size}, in multiples of {unit}")
    return 0


def _cheapest(planner: Planner, config: Any) -> int:
    best, tried = cheapest_mesh(planner, config)
    table = Table("target and layout", "memory", "", "step at best", "utilisation at most")
    for target, variant in tried:
        table.add_row(*_row(f"--target {target.name} {variant.name}", variant.plan, variant.reason))
    show(table)
    if best is None or best.plan is None:
        most = planner.target
        print(f"nothing that was tried fits, up to {most.name}; a larger --target may")
        return 1
    print(f"--target {best.plan.target.name} {best.name}")
    return 0
