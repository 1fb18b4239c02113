"""Plan a recipe's training step for chips that are not there, and what would change it."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from fnml.core import ConfigError, FnmlError, parse_mesh, shardings
from fnml.parallel import parse_rules
from fnml.plan import Plan, Target, plan
from fnml.recipes._devices import batch_spec
from fnml.recipes._recipe import Recipe, Task
from fnml.recipes._training import abstract_state, make_step
from fnml.transforms import cost, state_shardings

PyTree = Any
_LEAST: dict[tuple[str, int], list[tuple[int, ...]]] = {
    ("tpu", 2): [(1, 1), (2, 2)],
    ("tpu", 3): [(2, 2, 1)],
}


class Variant(NamedTuple):
    """A change to a configuration, and what it comes to.

    Attributes:
      name: the options that make it.
      config: the recipe's configuration, with its mesh and rules.
      plan: what it needs, or ``None`` where it cannot be compiled.
      reason: why not.
    """

    name: str
    config: Any
    plan: Plan | None = None
    reason: str = ""


@dataclasses.dataclass
class Planner:
    """Plans a recipe's step in many variants; each is built, traced and compiled once.

    Attributes:
      recipe: what trains.
      target: on which chips.
      python: see :func:`fnml.plan.plan`.
      cache: see :func:`fnml.plan.plan`.
      compiled: how many plans were made.
    """

    recipe: Recipe
    target: Target
    python: str | None = None
    cache: Path | None = None
    compiled: int = 0
    _made: dict[Any, Plan] = dataclasses.field(default_factory=dict)

    def __call__(self, config: Any, target: Target | None = None) -> Plan:
        """Plan one variant.

        Raises:
          FnmlError: the configuration cannot be laid out so, or the compiler refuses it.
        """
        target = target or self.target
        config = laid(config, target)
        key = (repr(config), target)
        if key not in self._made:
            task = self.recipe.build(config, None)
            state, batch = shapes(task, config)
            self.compiled += 1
            self._made[key] = plan(
                _step(task, config),
                state,
                batch,
                target=target,
                model_flops=_model_flops(task, config, state, batch),
                python=self.python,
                cache=self.cache,
            )
        return self._made[key]


def laid(config: Any, target: Target) -> Any:
    """Return a configuration whose mesh is spelt out: by default the batch is divided over all chips."""
    axes = parse_mesh(config.run.mesh) or {"data": target.chips}
    given = math.prod(size for size in axes.values() if size > 0)
    sizes = {axis: target.chips // given if size < 0 else size for axis, size in axes.items()}
    return with_run(config, devices=1, mesh=_text(sizes))


def _text(axes: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in axes.items())


def with_run(config: Any, **changes: Any) -> Any:
    """Return a recipe's configuration with other settings of its run."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **changes))


def _bare(config: Any) -> Any:
    """Return a configuration for one device: what it makes is laid out here, on no device at all."""
    return with_run(config, mesh="", rules="")


def shapes(task: Task, config: Any) -> tuple[PyTree, PyTree]:
    """Describe a recipe's state and batch, and where they lie.

    Raises:
      LayoutError: a dimension cannot be divided; all of them are listed.
    """
    axes = parse_mesh(config.run.mesh)
    auto = (AxisType.Auto,) * len(axes)
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=auto)
    state = abstract_state(task, _bare(config))
    rules = parse_rules(config.run.rules)
    where = state_shardings(state, shardings(task.model.spec, mesh, rules))

    def place(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    divided = NamedSharding(mesh, batch_spec(mesh))
    # One example tells the shapes of any number.
    one = dataclasses.replace(task.train, batch_size=1).at(task.train.position)
    size = config.run.batch_size
    batch = {
        name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype, sharding=divided)
        for name, x in one.items()
    }
    return jax.tree.map(place, state, where), batch


def _step(task: Task, config: Any) -> Callable[..., Any]:
    """Return the recipe's step as it is written for one device; the compiler divides it."""
    return make_step(task, _bare(config))


def _model_flops(task: Task, config: Any, state: PyTree, batch: PyTree) -> float:
    """Count the products of a step once, whatever it computes twice."""
    plain = _step(task, with_run(config, remat="off", accumulate=1))
    return cost(plain, state, batch, platform="other").total.products


def changes(config: Any) -> Iterator[Variant]:
    """Yield what remat, accumulation and FSDP would change, one at a time, and all of them.

    ``config`` is of :func:`laid`.
    """
    run = config.run
    ways = parse_mesh(run.mesh).get("data", 1)
    if run.remat != "nothing":
        yield Variant("--remat nothing", with_run(config, remat="nothing"))
    if run.remat != "off":
        yield Variant("--remat off", with_run(config, remat="off"))
    more = next((n for n in (4, 2) if run.batch_size % (run.accumulate * n * ways) == 0), 1)
    parts = run.accumulate * more
    if more > 1:
        yield Variant(f"--accumulate {parts}", with_run(config, accumulate=parts))
    sets = [name for name in run.rules.split("+") if name not in ("", "data")]
    rules = "+".join(sets if "fsdp" in sets else ["fsdp", *sets])
    if rules != run.rules and ways > 1:
        yield Variant(f"--rules {rules}", with_run(config, rules=rules))
    if sum((run.remat != "nothing", more > 1, rules != run.rules and ways > 1)) > 1:
        yield Variant(
            "all of these", with_run(config, remat="nothing", accumulate=parts, rules=rules)
        )


def try_out(planner: Planner, variant: Variant) -> Variant:
    """Plan a variant; one that cannot be is returned with the reason."""
    try:
        return variant._replace(plan=planner(variant.config))
    except FnmlError as error:
        return variant._replace(reason=str(error).split("\n")[0])


def largest_batch(
    planner: Callable[[int], Plan], unit: int, start: int, *, most: int = 8
) -> tuple[int, Plan | None, list[tuple[int, Plan]]]:
    """Search for the largest batch that fits, a multiple of ``unit``.

    A step's memory is nearly linear in its batch, so two plans say where the limit is, and the next
    ones close in on it.

    Args:
      planner: plans a step for a batch size.
      unit: what a batch size is a multiple of.
      start: where to begin.
      most: plans to make at most.

    Returns:
      The batch size, its plan, and all that was tried; 0 and ``None`` if nothing fits.

    Raises:
      ConfigError: ``unit``, ``start`` or ``most`` is below 1.
    """
    if min(unit, start, most) < 1:
        raise ConfigError(f"largest_batch needs positive numbers, got {unit=}, {start=}, {most=}")
    tried: dict[int, Plan] = {}
    guess = max(start // unit, 1)
    while len(tried) < most and guess not in tried:
        tried[guess] = planner(guess * unit)
        fitting = [n for n, p in tried.items() if p.fits]
        failing = [n for n, p in tried.items() if not p.fits]
        low, high = max(fitting, default=0), min(failing, default=None)
        guess = _guess({n: p for n, p in tried.items() if not p.refused}, tried, low, high)
        if high is not None and high - low <= 1:
            break
    best = max((n for n, p in tried.items() if p.fits), default=0)
    order = [(n * unit, p) for n, p in tried.items()]
    return best * unit, tried.get(best), order


def _guess(exact: Mapping[int, Plan], tried: Mapping[int, Plan], low: int, high: int | None) -> int:
    """Return the number of units to try next, between what fits and what does not."""
    if len(exact) < 2:
        return low * 2 if high is None else (low + high) // 2
    (a, first), *_, (b, last) = sorted(exact.items())
    slope = (last.memory.total - first.memory.total) / (b - a)
    limit = first.limit
    at = a + int((limit - first.memory.total) / slope) if slope > 0 else low * 2
    if high is None:
        # Far from what was measured, a line is trusted less.
        return min(max(at, low + 1), low * 8)
    return min(max(at, low + 1), high - 1) if at not in tried else (low + high) // 2


def shapes_of(target: Target) -> Iterator[Target]:
    """Yield the target's chip in fewer chips, the fewest first, up to the target itself.

    These are the slices of TPUs that are rented out, and hosts filled before there is another.

    >>> from fnml.plan import parse_target
    >>> [t.name for t in shapes_of(parse_target("v5e:4x4"))]
    ['v5e:1x1', 'v5e:2x2', 'v5e:2x4', 'v5e:4x4']
    """
    least = _LEAST.get((target.chip.platform, len(target.shape)), [(1,) * len(target.shape)])
    grow = [
        shape for shape in least if all(a <= b for a, b in zip(shape, target.shape, strict=True))
    ]
    grow = grow or [target.shape]
    while grow[-1] != target.shape:
        last = grow[-1]
        more = [i for i, (n, most) in enumerate(zip(last, target.shape, strict=True)) if n < most]
        # The GPUs of a host, or a torus that is kept as even as it can be: in both the last axis first.
        by_host = target.chip.platform == "cuda"
        axis = max(more) if by_host else min(more, key=lambda i: (last[i], -i))
        size = min(last[axis] * 2, target.shape[axis])
        grow.append((*last[:axis], size, *last[axis + 1 :]))
    for shape in grow:
        yield Target(target.chip, shape)


def layouts(chips: int, batch_size: int, heads: int) -> Iterator[tuple[str, str]]:
    """Yield meshes and rules over chips: data, FSDP, and either with tensor parallelism.

    >>> list(layouts(2, 8, 4))
    [('data=2', 'data'), ('data=2', 'fsdp'), ('data=1,model=2', 'tensor')]
    """
    model = 1
    while model <= min(chips, heads):
        data = chips // model
        if chips % model == 0 and heads % model == 0 and batch_size % data == 0:
            mesh = {"data": data} | ({"model": model} if model > 1 else {})
            rules = ("data", "fsdp") if model == 1 else ("tensor", "fsdp+tensor")
            for rule in rules if data > 1 else rules[:1]:
                yield _text(mesh), rule
        model *= 2


def cheapest_mesh(
    planner: Planner, config: Any, *, most: int = 12
) -> tuple[Variant | None, list[tuple[Target, Variant]]]:
    """Search for the fewest chips of the target's kind that fit, and the fastest mesh of them.

    What cannot fit by its parameters and optimizer state alone is not compiled.

    Args:
      planner: of the largest target allowed.
      config: the recipe's configuration.
      most: plans to make at most.

    Returns:
      The fastest fitting variant, or ``None``; and all that was tried, with its target.
    """
    heads = getattr(getattr(config, "model", None), "groups", 1)
    at_once = config.run.batch_size // config.run.accumulate
    tried: list[tuple[Target, Variant]] = []
    for target in shapes_of(planner.target):
        fitting: list[tuple[float, int, Variant]] = []
        for mesh, rules in layouts(target.chips, at_once, heads):
            name = f"--mesh {mesh} --rules {rules}"
            try:
                changed = with_run(config, devices=1, mesh=mesh, rules=rules)
                if len(tried) == most or _state_bytes(planner.recipe, changed) > target.chip.memory:
                    continue
                found = Variant(name, changed, planner(changed, target))
            except FnmlError as error:
                reason = str(error).split("\n")[0]
                tried.append((target, Variant(name, config, None, reason)))
                continue
            tried.append((target, found))
            if found.plan is not None and found.plan.fits:
                fitting.append((found.plan.seconds, len(fitting), found))
        if fitting:
            return min(fitting)[2], tried
    return None, tried


def _state_bytes(recipe: Recipe, config: Any) -> int:
    """Return the bytes of a state on one chip."""
    state, _ = shapes(recipe.build(config, None), config)
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )
