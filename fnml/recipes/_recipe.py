"""What a recipe is: a configuration, and what it builds to train on."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import tyro

from fnml.core import ConfigError, Metrics, Model
from fnml.data import Batches
from fnml.recipes._devices import layout_faults

PyTree = Any
# Marks a nested configuration whose options need no prefix: ``--steps`` instead of ``--run.steps``.
FLAT = tyro.conf.arg(name="")
LossFn = Callable[..., tuple[jax.Array, Metrics]]
_MOST_STEPS = 2**31 - 1  # the state counts them in int32


def _divides(devices: int, shards: int) -> bool:
    """Tell whether each device gets as many shards, and a power of two of them."""
    each, rest = divmod(shards, devices)
    return not rest and each & (each - 1) == 0 and each > 0


@dataclass(frozen=True)
class RunConfig:
    """Say how a run goes: how long, on what batches, and what is done how often.

    Raises:
      ConfigError: a value is out of range; all of them are listed.
    """

    steps: int = 1000
    """Training steps in all."""
    batch_size: int = 128
    """Examples in a step."""
    seed: int = 0
    """Decides the initial parameters, the order of the examples and all random draws."""
    accumulate: int = 1
    """Equal shards that a step's batch is computed in, one after the other; they decide the bits."""
    devices: int = 1
    """Devices that share those shards; any number gives the same bits, also on resuming."""
    mesh: str = ""
    """Axes that the compiler divides a step along, such as data=2,model=4; equal to rounding."""
    rules: str = ""
    """What lies along which axis of the mesh: data, fsdp, tensor, expert, joined by +."""
    remat: Literal["off", "nothing", "dots", "dots_no_batch", "everything"] = "off"
    """What to keep for the backward pass ("nothing" saves most memory); "off" decides nothing."""
    fuse: int = 1
    """Steps per dispatch, the results are the same bits; 0 measures after the first step."""
    keep_memory: bool = False
    """On CPU, keep freed memory for the next step: faster for single steps of larger models."""
    native: bool = False
    """On CPU, take the C++ bodies of kernels and layers: faster, equal to rounding."""
    log_every: int = 50
    """Steps between rows of training metrics."""
    eval_every: int = 500
    """Steps between evaluations on the held-out set."""
    save_every: int = 500
    """Steps between checkpoints."""
    save_minutes: float = 10.0
    """Minutes after which a checkpoint is due in any case."""
    keep_last: int = 2
    """Checkpoints kept, counted from the newest."""
    keep_best: int = 1
    """Checkpoints kept beside those, best held-out metric first."""
    patience: int = 0
    """Evaluations without improvement after which the run stops; 0 for never."""

    def __post_init__(self) -> None:
        least = {
            "steps": 1,
            "batch_size": 1,
            "seed": 0,
            "accumulate": 1,
            "devices": 1,
            "fuse": 0,
            "log_every": 1,
            "eval_every": 1,
            "save_every": 1,
            "keep_last": 1,
            "keep_best": 0,
            "patience": 0,
        }
        faults = [
            f"{name}={getattr(self, name)}: expected at least {low}"
            for name, low in least.items()
            if getattr(self, name) < low
        ]
        if self.steps > _MOST_STEPS:
            faults.append(f"steps={self.steps}: expected at most {_MOST_STEPS}")
        if not self.save_minutes > 0:
            faults.append(f"save_minutes={self.save_minutes}: expected more than 0")
        if self.accumulate > 0 and self.batch_size % self.accumulate:
            faults.append(
                f"accumulate={self.accumulate}: expected a divisor of batch_size={self.batch_size}"
            )
        if self.accumulate > 0 and self.devices > 1 and not _divides(self.devices, self.accumulate):
            halvings = (self.accumulate & -self.accumulate).bit_length()
            fine = sorted({1, *(self.accumulate >> k for k in range(halvings))})
            faults.append(
                f"devices={self.devices}: accumulate={self.accumulate} shards can be shared by "
                f"{' or '.join(map(str, fine))} devices, each with a power of two of them"
            )
        if self.mesh and self.devices > 1:
            faults.append(
                f"mesh={self.mesh!r} and devices={self.devices}: --devices shares equal shards, to "
                "the same bits, and --mesh leaves the dividing to the compiler: give one of them"
            )
        at_once = self.batch_size // max(self.accumulate, 1)
        faults += layout_faults(self.mesh, self.rules, at_once)
        if faults:
            raise ConfigError("; ".join(faults))


@dataclass(frozen=True)
class SampleConfig:
    """Say what to draw from a trained model.

    Raises:
      ConfigError: a value is out of range; all of them are listed.
    """

    prompt: str = ""
    """Text to go on from (language models)."""
    length: int = 400
    """How many tokens to draw, or examples to show."""
    temperature: float = 0.8
    """0 takes the likeliest token; 1 draws from the model's own distribution."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0 for all."""
    seed: int = 0
    """Decides the draws."""

    def __post_init__(self) -> None:
        faults = [
            f"{name}={getattr(self, name)}: expected {expected}"
            for name, fine, expected in (
                ("length", self.length >= 1, "at least 1"),
                ("temperature", self.temperature >= 0, "at least 0"),
                ("top_k", self.top_k >= 0, "at least 0"),
                ("seed", 0 <= self.seed < 2**63, "at least 0 and below 2**63"),
            )
            if not fine
        ]
        if faults:
            raise ConfigError("; ".join(faults))


class Task(NamedTuple):
    """What a recipe's configuration comes to: a model, its loss, and data.

    Attributes:
      model: the model that is trained.
      loss_fn: ``loss_fn(params, batch, key, **options) -> (loss, metrics)`` for training.
      eval_loss_fn: the same for evaluation; it is called without a key.
      train: the stream of training batches.
      held_out: returns the batches to evaluate on, anew at each call.
      best: the held-out metric that ranks checkpoints, and which way is better.
      sample: ``sample(params, model_state, config) -> text``, drawn from the trained model.
      files: small files the run directory has to keep, such as a tokenizer, by name.
      predict: ``predict(params, *fields, state) -> outputs``, what is exported: the model on the
        fields of a batch that its parameters are named by; ``None`` if there is no such thing.
        ``params`` are those of the model before its edits (:func:`fnml.transforms.merge`).
      start: ``start(key) -> params``, where training begins, the same for the same key; by default
        ``init(model.spec, key)``.
    """

    model: Model
    loss_fn: LossFn
    eval_loss_fn: LossFn
    train: Batches
    held_out: Callable[[], Iterable[PyTree]]
    best: tuple[str, Literal["min", "max"]]
    sample: Callable[[PyTree, PyTree, SampleConfig], str]
    files: Mapping[str, bytes] = {}
    predict: Callable[..., PyTree] | None = None
    start: Callable[[jax.Array], PyTree] | None = None


class Recipe(NamedTuple):
    """A named way to train: a configuration dataclass, and how to build its task.

    Attributes:
      config: a frozen dataclass with defaults for every field, among them ``run``, a
        :class:`RunConfig`, and ``optimizer``, a :class:`fnml.train.OptimizerConfig`. Its docstring
        states the command, the time it takes and the result.
      build: ``build(config, directory) -> Task``; ``directory`` is the run directory when a run is
        taken up again (the files of :attr:`Task.files` are there), else ``None``.
    """

    config: type
    build: Callable[[Any, Path | None], Task]

    @property
    def summary(self) -> str:
        """The first line of the configuration's docstring."""
        return (self.config.__doc__ or "").strip().split("\n")[0]


@dataclass(frozen=True)
class Output:
    """Say where a run's record goes.

    Raises:
      ConfigError: the port is none.
    """

    sinks: tuple[str, ...] = ("jsonl", "csv")
    """Files and services that get every row: jsonl, csv, tensorboard, prometheus, or a plugin's."""
    prometheus_port: int = 9464
    """The loopback port that the prometheus sink serves /metrics on; 0 for a free one."""
    quiet: bool = False
    """Show no progress on the terminal."""

    def __post_init__(self) -> None:
        if not 0 <= self.prometheus_port <= 65535:
            raise ConfigError(f"prometheus_port={self.prometheus_port}: expected 0 to 65535")
