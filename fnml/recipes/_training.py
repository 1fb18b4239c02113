"""What a configuration trains: its first state, its step, and the devices that both are on."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import optax

from fnml import transforms
from fnml.core import CheckpointError, State, fold_name, init
from fnml.recipes._config_json import from_json, to_json
from fnml.recipes._devices import mesh, provide
from fnml.recipes._memory import keep_memory
from fnml.recipes._plugins import find_recipe
from fnml.recipes._recipe import Recipe, Task
from fnml.train import optimizer, train_step

# It may change on resuming, since it changes no bits.
_LAYOUT = ("run/devices",)


def read_config(record: Mapping[str, Any]) -> tuple[Recipe, Any]:
    """Return a run's recipe and its configuration."""
    recipe = find_recipe(record["recipe"])
    return recipe, from_json(recipe.config, record["config"])


def prepare(config: Any) -> None:
    """Do what has to be done before the first computation."""
    if config.run.keep_memory:
        keep_memory()
    provide(config.run.devices)


def initial_state(task: Task, config: Any) -> State:
    """Draw the state before the first step."""
    init_key, run_key = jax.random.split(jax.random.key(config.run.seed))
    return State.create(
        init(task.model.spec, init_key) if task.start is None else task.start(init_key),
        _optimizer(task, config),
        run_key,
        init(task.model.state, fold_name(init_key, "state")),
    )


def _partly_frozen(task: Task) -> bool:
    return not all(jax.tree.leaves(transforms.trainable(task.model)))


def _optimizer(task: Task, config: Any) -> optax.GradientTransformation:
    rule = optimizer(config.optimizer, config.run.steps)
    return transforms.train_only(rule, task.model) if _partly_frozen(task) else rule


def abstract_state(task: Task, config: Any) -> State:
    """Describe a run's state without computing anything."""
    return jax.eval_shape(functools.partial(initial_state, task, config))


def placed(state: State, config: Any) -> State:
    """Put a state, or a description of one, on all of the run's devices."""
    devices = mesh(config.run.devices)
    if devices is None:
        return state
    everywhere = jax.NamedSharding(devices, jax.P())

    def place(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
        return jax.device_put(x, everywhere)

    return jax.tree.map(place, state)


def make_step(task: Task, config: Any) -> Any:
    """Make the run's training step, laid out over its devices."""
    run, loss_fn = config.run, task.loss_fn
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
    if devices is None:
        return step
    everywhere = jax.NamedSharding(devices, jax.P())

    def replicated(state: State, batch: Any) -> Any:
        state, metrics = step(state, batch)
        # Left to the compiler, the placing may change from step to step, and each is compiled anew.
        return jax.lax.with_sharding_constraint(state, everywhere), metrics

    return replicated


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
