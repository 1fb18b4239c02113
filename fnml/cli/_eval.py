"""``fnml eval RUN``, ``fnml eval MODEL.onnx --data DATA.npz``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from fnml.core import ConfigError
from fnml.recipes import evaluate, evaluate_onnx, load


@dataclass(frozen=True)
class Eval:
    """Evaluate a run's model on the recipe's held-out set, or a model file on data of your own."""

    run: tyro.conf.Positional[Path]
    """The run directory. Or an ONNX file, with --data."""
    step: int | None = None
    """The checkpoint's step; by default the newest."""
    data: Path | None = None
    """For an ONNX file: an npz file with one array for each input by its name, and "targets"."""
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    """For an ONNX file: targets are class numbers, or arrays like the first output."""


def command(arguments: Sequence[str]) -> int:
    """Evaluate and print one ``name value`` line for each metric."""
    parsed = tyro.cli(Eval, args=arguments, prog="fnml eval")
    if parsed.run.suffix == ".onnx" and not parsed.run.is_dir():
        metrics = _of_file(parsed)
    else:
        if parsed.data is not None or parsed.loss != "cross_entropy":
            raise ConfigError(
                f"--data and --loss are for ONNX files; a run such as {parsed.run} has its own"
            )
        loaded = load(parsed.run, parsed.step)
        print(f"step {loaded.step}")
        metrics = evaluate(loaded)
    for name, value in metrics.items():
        print(f"{name} {value:.6g}")
    return 0


def _of_file(parsed: Eval) -> dict[str, float]:
    if parsed.step is not None:
        raise ConfigError(f"{parsed.run} is a file, and --step chooses a checkpoint of a run")
    if parsed.data is None:
        raise ConfigError(f"what shall {parsed.run} be measured on? Give --data DATA.npz")
    return evaluate_onnx(parsed.run, parsed.data, parsed.loss)
