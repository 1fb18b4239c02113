"""Recipe: go on training a model from an ONNX file."""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnml import transforms
from fnml.core import ConfigError, DataError, Mean, Metrics, Model, ShapeError, State, require
from fnml.data import Batches, Source, epoch, split
from fnml.recipes._examples import (
    TARGETS,
    Examples,
    fit_targets,
    fixed_rows,
    read_examples,
    rows_of,
)
from fnml.recipes._recipe import FLAT, Recipe, RunConfig, SampleConfig, Task
from fnml.train import OptimizerConfig, accuracy, cross_entropy, evaluator, means, mse

PyTree = Any
Loss = Literal["cross_entropy", "mse"]
_COPY = "original.onnx"
_HELD_OUT = 0.1
_EVAL_ROWS = 256


@dataclass(frozen=True)
class FinetuneConfig:
    """Go on training a model from an ONNX file, on examples of your own.

    Command: ``fnml train finetune --onnx MODEL.onnx --data DATA.npz``. Time: the model's own; a
    perceptron takes seconds. Result: ``fnml export RUN --to onnx`` writes the tuned model with
    plain weights.
    """

    run: Annotated[RunConfig, FLAT] = RunConfig(
        steps=300, batch_size=32, log_every=50, eval_every=100, save_every=100
    )
    """How the run goes."""
    optimizer: Annotated[OptimizerConfig, FLAT] = OptimizerConfig(learning_rate=3e-4)
    """How parameters are updated."""
    onnx: str = ""
    """The model: an ONNX file, which is copied into the run directory. Its weights are the start."""
    data: str = ""
    """An npz file: one array [N, ...] for each input by its name, and "targets"."""
    loss: Loss = "cross_entropy"
    """Targets are class numbers for the first output's logits, or arrays like the first output."""
    lora: int = 0
    """Train factors of this rank beside the frozen weights; 0 to train the weights themselves."""
    quantize: Literal[0, 4, 8] = 0
    """Keep the frozen weight matrices in so many bits; 0 for as they are."""
    targets: tuple[str, ...] = ()
    """Path globs of the weights that get factors; all matrices if there are none."""

    def __post_init__(self) -> None:
        faults = [] if self.lora >= 0 else [f"lora={self.lora}: expected a rank, or 0 for none"]
        if self.targets and not self.lora:
            faults.append("targets choose what gets factors: give a rank with --lora")
        if self.quantize and not self.lora:
            faults.append(
                f"quantize={self.quantize}: codes do not train, so something else has to: give a "
                "rank with --lora"
            )
        if faults:
            raise ConfigError("; ".join(faults))


class _Imported(NamedTuple):
    """A model from a file, what its file holds, and examples that fit it."""

    model: Model
    params: PyTree
    examples: Examples
    rows: int | None


def _import(path: Path, data: Path, loss: str, rows: int) -> _Imported:
    """Read a model, and the examples for it; ``rows`` are given at once where that is open."""
    from fnml.interop.onnx import from_onnx

    model, params = from_onnx(path)
    apply: Any = model.apply
    fixed = fixed_rows(apply.inputs)
    examples = read_examples(data, apply.inputs)
    batch = rows_of(examples.source.arrays, fixed or rows, examples.fields)
    output = jax.eval_shape(
        lambda params, inputs, key: _first(apply(params, *inputs, key=key)),
        params,
        batch,
        jax.random.key(0),
    )
    return _Imported(model, params, fit_targets(examples, output, loss), fixed)


def _first(outputs: Any) -> jax.Array:
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _loss_fn(model: Model, fields: tuple[str, ...], loss: str) -> Callable[..., Any]:
    def loss_fn(params: PyTree, batch: PyTree, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        out = _first(model.apply(params, *(batch[field] for field in fields), key=key))
        targets, weights = batch[TARGETS], batch.get("mask")
        if weights is not None:
            sizes = (1,) * (targets.ndim - 1)
            weights = jnp.broadcast_to(weights.reshape(-1, *sizes), targets.shape)
        if loss == "mse":
            error = mse(out, targets, weights=weights)
            return error.value, Metrics(error.weight)
        entropy: Mean = cross_entropy(out, targets, weights=weights)
        right = accuracy(out, targets, weights=weights)
        return entropy.value, Metrics(entropy.weight, {"accuracy": right})

    return loss_fn


def _predictor(model: Model, fields: tuple[str, ...]) -> Callable[..., Any]:
    """Return the plain model's outputs, as a function of parameters named like the file's inputs."""

    def predict(params: PyTree, *inputs: jax.Array, state: PyTree) -> Any:
        try:
            return model.apply(params, *inputs)
        except ShapeError as error:
            if all(isinstance(size, int) for x in inputs for size in x.shape):
                raise
            raise ShapeError(
                f"{error}\nThe model's file needs sizes that are known: export with --dynamic ..."
            ) from error

    kinds = inspect.Parameter
    predict.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *(kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in ("params", *fields)),
            kinds("state", kinds.KEYWORD_ONLY),
        ]
    )
    return predict


def _sampler(
    model: Model, fields: tuple[str, ...], source: Source, rows: int, loss: str
) -> Callable[[PyTree, PyTree, SampleConfig], str]:
    """Show held-out examples as text: what the model says, and what is right."""

    def sample(params: PyTree, state: PyTree, config: SampleConfig) -> str:
        order = np.random.default_rng(config.seed).permutation(len(source))
        # A file may take only so many examples at once.
        batch = source.gather(np.resize(order, rows))
        out = _first(jax.jit(model.apply)(params, *(batch[field] for field in fields)))
        lines = []
        for i in range(min(config.length, 8, len(source), rows)):
            said, right = np.asarray(out[i]), batch[TARGETS][i]
            if loss == "cross_entropy":
                said = said.argmax(-1)
            lines.append(f"held-out example {order[i]}: {_brief(said)}, is {_brief(right)}")
        return "\n".join(lines)

    return sample


def _brief(array: Any) -> str:
    return np.array2string(np.asarray(array), precision=4, threshold=16, separator=", ")


def _edited(config: FinetuneConfig, imported: _Imported) -> Model:
    """Return the model with what the configuration trains; the rest of it is frozen."""
    model = imported.model
    if not config.lora:
        averages = _moving_averages(model)
        return transforms.freeze(model, averages) if averages else model
    if config.quantize:
        model = transforms.quantize(model, config.quantize)
        # Only weights that are known, and not traced, can be refused for being NaN.
        transforms.adapt(model, imported.params)
    return transforms.lora(model, config.lora, targets=config.targets or None)


def _moving_averages(model: Model) -> list[str]:
    """Return the paths of means and variances, which no gradient should move."""
    apply: Any = model.apply
    named = {
        name
        for step in apply.graph.steps
        if step.node.op == "BatchNormalization"
        for name in step.node.inputs[3:5]
    }
    return ["/".join(apply.paths[name]) for name in sorted(named & apply.paths.keys())]


def _whole(path: Path) -> bytes:
    """Return a model as one file, with the data that it may keep beside it."""
    onnx = require("onnx", extra="onnx")
    try:
        return onnx.load(path).SerializeToString()
    except ValueError as error:
        raise DataError(
            f"{path} with its data is more than one file can hold, so the run cannot keep it: "
            f"{error}"
        ) from error


def _build(config: FinetuneConfig, directory: Path | None) -> Task:
    missing = [f"--{name}" for name in ("onnx", "data") if not getattr(config, name)]
    if missing:
        raise ConfigError(
            f"finetune needs {' and '.join(missing)}: a model file, and an npz file of examples"
        )
    path = Path(config.onnx) if directory is None else directory / _COPY
    shard = config.run.batch_size // config.run.accumulate
    imported = _import(path, Path(config.data), config.loss, shard)
    if imported.rows not in (None, shard):
        raise ConfigError(
            f"{path} takes {imported.rows} examples at once, and batch_size="
            f"{config.run.batch_size} with accumulate={config.run.accumulate} gives it {shard}: "
            f"use --batch-size {imported.rows * config.run.accumulate}, or a file whose first "
            "axis is open"
        )
    if not jax.tree.leaves(imported.params):
        raise ConfigError(f"{path} holds no float weights: there is nothing to train")
    model = _edited(config, imported)
    fields, source = imported.examples.fields, imported.examples.source
    train, held_out = split(source, _HELD_OUT)
    rows = imported.rows or min(_EVAL_ROWS, len(held_out))
    loss_fn = _loss_fn(model, fields, config.loss)
    return Task(
        model=model,
        loss_fn=loss_fn,
        eval_loss_fn=loss_fn,
        train=Batches(train, config.run.batch_size, seed=config.run.seed),
        held_out=lambda: epoch(held_out, rows),
        best=("accuracy", "max") if config.loss == "cross_entropy" else ("loss", "min"),
        sample=_sampler(model, fields, held_out, rows, config.loss),
        files={_COPY: _whole(path)} if directory is None else {},
        predict=_predictor(imported.model, fields),
        start=functools.partial(
            jax.jit(functools.partial(transforms.adapt, model)), imported.params
        ),
    )


finetune = Recipe(FinetuneConfig, _build)


def evaluate_onnx(path: Path, data: Path, loss: Loss = "cross_entropy") -> dict[str, float]:
    """Measure a model file as it is, on all examples of an npz file.

    Args:
      path: the ONNX file.
      data: one array ``[N, ...]`` for each input by its name, and ``targets``.
      loss: what to compute; with ``"cross_entropy"`` the accuracy, too.

    Raises:
      FnmlError: the model or the data cannot be read, or do not fit each other.
    """
    imported = _import(path, data, loss, 1)
    examples = imported.examples
    rows = imported.rows or min(_EVAL_ROWS, len(examples.source))

    def batches() -> Iterable[PyTree]:
        return epoch(examples.source, rows)

    state = State(jnp.zeros((), jnp.int32), imported.params, (), jax.random.key(0), ())
    measure = evaluator(_loss_fn(imported.model, examples.fields, loss), batches)
    return means(measure(state))
