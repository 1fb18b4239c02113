"""What a configuration trains: its first state, its step, and the devices that both are on."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import optax

from fnml import transforms
from fnml.core import (
    CheckpointError,
    Metrics,
    State,
    abstract,
    constrain,
    fold_name,
    init,
    keep_memory,
    shardings,
)
from fnml.pallas_kernels import build_native
from fnml.parallel import parse_rules, spread
from fnml.recipes._config_json import from_json, to_json
from fnml.recipes._devices import batch_spec, compiled_mesh, device_count, mesh, provide
from fnml.recipes._plugins import find_recipe
from fnml.recipes._recipe import LossFn, Recipe, Task
from fnml.train import optimizer, train_step

# It may change on resuming: the first changes no bits, the others only how sums are rounded.
_LAYOUT = ("run/devices", "run/mesh", "run/rules", "run/native")


def read_config(record: Mapping[str, Any]) -> tuple[Recipe, Any]:
    """Return a run's recipe and its configuration."""
    recipe = find_recipe(record["recipe"])
    return recipe, from_json(recipe.config, record["config"])


def prepare(config: Any) -> None:
    """Do what has to be done before the first computation."""
    if config.run.keep_memory:
        keep_memory()
    if config.run.native:
        build_native()
    provide(device_count(config.run))


def initial_state(task: Task, config: Any) -> State:
    """Draw the state before the first step."""
    return _draw(task, config)()


@contextlib.contextmanager
def drawing(task: Task, config: Any) -> Iterator[Callable[[], State]]:
    """Draw the state before the first step in a thread; give a function that waits for it.

    It is traced before, by the caller, whose settings of JAX are the caller's own. What is left, to
    compile it or to read it from the cache and to run it, is done while Python traces the step.
    """
    draw = _draw(task, config)
    if task.start is not None:
        yield draw
        return
    with ThreadPoolExecutor(1, thread_name_prefix="fnml-draw") as pool:
        yield pool.submit(draw).result


def _draw(task: Task, config: Any) -> Callable[[], State]:
    """Return what draws the state before the first step, traced where it can be."""

    def draw(seed: Any) -> State:
        init_key, run_key = jax.random.split(jax.random.key(seed))
        return State.create(
            init(task.model.spec, init_key) if task.start is None else task.start(init_key),
            _optimizer(task, config),
            run_key,
            init(task.model.state, fold_name(init_key, "state")),
        )

    # Weights that are there would be constants in the program.
    if task.start is not None:
        return functools.partial(draw, config.run.seed)
    # One program starts sooner than dozens, and each device draws only its part.
    seed = np.int64(config.run.seed)
    several = bool(config.run.mesh) or config.run.devices > 1
    places = _places(jax.eval_shape(draw, seed), task, config) if several else None
    traced = jax.jit(draw, out_shardings=places).lower(seed)
    # Where memory does not suffice, some of the arrays raise, and reading the others would wait for
    # ever: all are asked at once.
    return lambda: jax.block_until_ready(traced.compile()(seed))


def _partly_frozen(task: Task) -> bool:
    return not all(jax.tree.leaves(transforms.trainable(task.model)))


def _optimizer(task: Task, config: Any) -> optax.GradientTransformation:
    rule = optimizer(config.optimizer, config.run.steps)
    return transforms.train_only(rule, task.model) if _partly_frozen(task) else rule


def abstract_state(task: Task, config: Any) -> State:
    """Describe a run's state without computing anything."""
    key = jax.eval_shape(jax.random.key, 0)
    params = abstract(task.model.spec)
    if task.start is not None:
        params = jax.eval_shape(task.start, key)
    state = abstract(task.model.state)
    # Drawing is not traced: that would take longer than all the rest.
    create = functools.partial(State.create, optimizer=_optimizer(task, config))
    return jax.eval_shape(lambda p, k, s: create(p, key=k, model_state=s), params, key, state)


def _by_rules(state: State, divided: jax.sharding.Mesh, task: Task, config: Any) -> State:
    rules = parse_rules(config.run.rules)
    return transforms.state_shardings(state, shardings(task.model.spec, divided, rules))


def _places(state: State, task: Task, config: Any) -> State | None:
    """Return where each part of a state lies; ``None`` for one device."""
    divided, devices = compiled_mesh(config.run), mesh(config.run.devices)
    if divided is not None:
        return _by_rules(state, divided, task, config)
    if devices is None:
        return None
    everywhere = jax.NamedSharding(devices, jax.P())
    return jax.tree.map(lambda x: everywhere, state)


def placed(state: State, task: Task, config: Any) -> State:
    """Put a state, or a description of one, on the run's devices."""
    places = _places(state, task, config)
    if places is None:
        return state

    def place(x: Any, where: jax.NamedSharding) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        return spread(x, where)

    return jax.tree.map(place, state, places)


def as_configured(loss_fn: LossFn, config: Any) -> LossFn:
    """Return a loss with the bodies asked for, that knows of the mesh it is divided over, if any."""
    if config.run.native:
        loss_fn = transforms.native(loss_fn)
    divided = compiled_mesh(config.run)
    if divided is None:
        return loss_fn
    examples = batch_spec(divided)

    def known(params: Any, batch: Any, key: Any, **options: Any) -> tuple[jax.Array, Metrics]:
        with jax.sharding.use_abstract_mesh(divided.abstract_mesh):
            # Cut into micro-batches, a batch would lie with some devices only.
            batch = jax.tree.map(lambda x: constrain(x, examples), batch)
            return loss_fn(params, batch, key, **options)

    return known


def make_step(task: Task, config: Any) -> Any:
    """Make the run's training step, laid out over its devices; it is traced once for all uses."""
    run, loss_fn = config.run, as_configured(task.loss_fn, config)
    if run.remat != "off":
        loss_fn = transforms.remat(loss_fn, run.remat)
    if _partly_frozen(task):
        grad_fn = transforms.trainable_value_and_grad(loss_fn, task.model)
    else:
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    devices = mesh(run.devices)
    if run.accumulate > run.devices:
        grad_fn = transforms.accumulate(grad_fn, run.accumulate // run.devices)
    if devices is not None:
        grad_fn = transforms.data_parallel(grad_fn, devices)
    step = train_step(grad_fn, _optimizer(task, config))
    if run.native:
        step = transforms.native(step)
    divided = compiled_mesh(run)
    if divided is not None:
        places = _by_rules(abstract_state(task, config), divided, task, config)
        return transforms.shard(step, divided, places, batch_spec(divided))
    if devices is None:
        return jax.jit(step, inline=True)
    everywhere = jax.NamedSharding(devices, jax.P())

    def replicated(state: State, batch: Any) -> Any:
        state, metrics = step(state, batch)
        # Left to the compiler, the placing may change from step to step, and each is compiled anew.
        return jax.lax.with_sharding_constraint(state, everywhere), metrics

    return jax.jit(replicated, inline=True)


def check_config(meta: Mapping[str, Any], config: Any) -> None:
    """Refuse a checkpoint of another configuration; where it is computed does not matter.

    Raises:
      CheckpointError: fields differ; all are listed.
    """
    differing = [
        f"{path}: {there!r} in the checkpoint, {here!r} in config.json"
        for path, there, here in differences(meta.get("config"), to_json(config))
        if path not in _LAYOUT
    ]
    if differing:
        raise CheckpointError(
            "the checkpoints are of another configuration than the run's config.json: "
            + "; ".join(differing)
            + ". Put config.json back as it was"
        )


def differences(there: Any, here: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield ``(path, there, here)`` for each value that differs between two JSON documents."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for name in sorted(there.keys() | here.keys()):
            yield from differences(there.get(name), here.get(name), f"{path}/{name}".lstrip("/"))
    elif there != here:
        yield path or "config", there, here
